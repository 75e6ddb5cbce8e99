"""The paper's benchmarks from archives to training, with the published layouts.

The real corpora are not part of the project; tests that need them are skipped without them.
"""

import argparse
import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import toy_task
from http_server import FaultyServer
from prepared_folder import contents

from fairseq_smoe.benchmarks import benchmark
from fairseq_smoe.commands import prepare
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import sources

CORPORA = Path(__file__).resolve().parents[3] / "shared" / "data"
M15, OPUS_GETTEXT = CORPORA / "m15.tar.xz", CORPORA / "opus-gettext.tar.xz"
CHECKPOINT_OPTIONS = ["--no-epoch-checkpoints", "--disable-validation", "--max-tokens", "2000"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    prepare.run(parser.parse_args([str(argument) for argument in arguments]))


def sentences(lang, number):
    rng = np.random.default_rng(number)  # the same meaning in every language
    words = rng.integers(0, 50, (number, 4))
    return "".join(" ".join(f"{lang}{word}" for word in line) + "\n" for line in words)


def tar_gz(members):
    """An archive of ``{path: text}``."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for path, text in members.items():
            info = tarfile.TarInfo(path)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return data.getvalue()


def test_the_benchmarks_are_those_of_the_paper():
    m4, m15, opus = map(benchmark.load, benchmark.PAPERS)
    assert m4.pairs() == ["eng-nso", "eng-msa", "eng-tgl", "eng-cat"]
    assert set(m4.pairs()) < set(m15.pairs()) and len(m15.pairs()) == 15
    assert m15.flores_codes()["msa"] == "zsm_Latn"
    assert len(opus.pairs()) == 94 and len(opus.pairs(train_only=True)) == 99
    groups = [lang.resource for lang in opus.languages if not lang.train_only]
    assert [groups.count(g) for g in ("high", "medium", "low")] == [45, 28, 21]
    assert [b.vocab_size for b in (m4, m15, opus)] == [32000, 32000, 64000]
    assert [b.temperature for b in (m4, m15, opus)] == [1, 1, 5]
    assert len(sources.opus100_archives()) == 99


@pytest.mark.parametrize("name", benchmark.PAPERS)
def test_the_scripts_explain_themselves_and_name_mistakes(name, tmp_path):
    script = f"data-prep/{name}.sh"
    for arguments, returncode in ((["--help"], 0), ([], 2), (["--from", "x"], 2)):
        outcome = toy_task.run("bash", script, *arguments, check=False)
        assert outcome.returncode == returncode
        assert f"usage: bash {script} DIR" in outcome.stdout + outcome.stderr
    outcome = toy_task.run("bash", script, tmp_path, "--from", "nowhere.zip", check=False)
    assert outcome.returncode == 1
    assert re.search(r"^error: --from .*nowhere.zip: no such file", outcome.stderr, re.MULTILINE)


# --------------------------------------------------------------------------------------
# published archives, from a server


@pytest.fixture
def opus(tmp_path, monkeypatch):
    """A server of three small archives in OPUS-100's layout; ``yo`` has no text to test on."""
    folder = tmp_path / "served"
    folder.mkdir()
    published = []
    for entry in sources.opus100_archives():
        if entry.lang not in ("af", "fr", "yo"):
            continue
        sizes = {"train": 300, **({} if entry.lang == "yo" else {"dev": 20, "test": 20})}
        path = f"opus-100-corpus/v1.0/supervised/{entry.pair}/opus.{entry.pair}"
        data = tar_gz(
            {
                f"{path}-{split}.{lang}": sentences(lang, size)
                for split, size in sizes.items()
                for lang in entry.pair.split("-")
            }
        )
        (folder / entry.archive).write_bytes(data)
        facts = {"archive_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        published.append(type(entry)(**{**vars(entry), **facts}))
    # the list of archives is data: the real ones are gigabytes
    monkeypatch.setattr(sources, "opus100_archives", lambda: published)
    with FaultyServer(folder) as server:
        yield server


def opus_options(server, target):
    return [
        *("--benchmark", "opus100", "--pairs", "en-af,en-fr,en-yo", "--base-url", server.url),
        *("--to", target, "--vocab-size", 60, "--workers", 1),
    ]


@pytest.fixture
def undisturbed(opus, tmp_path):
    run(*opus_options(opus, tmp_path / "undisturbed"))
    opus.requests.clear()
    return contents(tmp_path / "undisturbed")


def test_opus100_from_its_archives(undisturbed):
    names = {name for name in undisturbed if name.endswith(".bin")}
    assert "train.en-yo.yo.bin" in names and "test.en-af.af.bin" in names
    assert not any(name.startswith(("test.en-yo", "valid.en-yo")) for name in names)
    assert undisturbed["langs.txt"] == b"af\nen\nfr\nyo\n"


@pytest.mark.parametrize(
    "faults",
    [
        {"cut_after": 700, "cuts": 4},
        {"cut_after": 700, "cuts": 2, "ranges": False},
        {"statuses": [503, 503, 429]},
        {"wrong": b"not what was published", "times_wrong": 1},
    ],
    ids=["cut", "cut-without-ranges", "overloaded", "wrong-once"],
)
def test_a_fault_that_passes_leaves_no_trace(faults, opus, undisturbed, tmp_path):
    for name, value in faults.items():
        setattr(opus, name, value)
    run(*opus_options(opus, tmp_path / "data"))
    assert contents(tmp_path / "data") == undisturbed


def break_archive(opus, how):
    """Damage what the server has of ``fr``; returns what was there."""
    path = opus.folder / "opus-100-corpus-en-fr-v1.0.tar.gz"
    before = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(before[:-200])
    else:
        path.write_bytes(bytes([before[0]]) + before[:0:-1])
    return path, before


@pytest.mark.parametrize(
    "how, message",
    [
        ("gone", "en-fr-v1.0.tar.gz: .*404.*--base-url"),
        ("truncated", "en-fr-v1.0.tar.gz: .*bytes"),
        ("changed", "en-fr-v1.0.tar.gz: .*SHA-256"),
    ],
)
def test_a_fault_that_stays_is_named_and_nothing_damaged_is_used(
    how, message, opus, undisturbed, tmp_path
):
    path, before = break_archive(opus, how)
    with pytest.raises(OptionError, match=message) as error:
        run(*opus_options(opus, tmp_path / "data"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data/work/downloads" / path.name).exists()
    path.write_bytes(before)
    run(*opus_options(opus, tmp_path / "data"))
    assert contents(tmp_path / "data") == undisturbed


@pytest.mark.parametrize("how", ["escapes", "truncated"])
def test_a_bad_archive_of_ones_own_is_named(how, opus, undisturbed, tmp_path):
    path = tmp_path / "own.tar.gz"
    good = tar_gz({f"train.en-fr.{lang}": sentences(lang, 300) for lang in ("en", "fr")})
    escape = f"../../escaped.en-fr.{'x' * 5}"
    bad = {"escapes": tar_gz({escape: "text\n"}), "truncated": good[:-100]}
    path.write_bytes(bad[how])
    with pytest.raises(OptionError, match=r"own\.tar\.gz.*(escaped|damaged)") as error:
        run("--from", path, "--pairs", "en-fr", "--to", tmp_path / "data", "--vocab-size", 60)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("escaped*"))
    assert not list((tmp_path / "data").rglob("train*"))


@pytest.mark.parametrize("at_hand", [False, True], ids=["all-fetched", "flores-fetched"])
def test_m4_from_the_authors_archive_and_flores(at_hand, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    langs = [lang.code for lang in benchmark.load("m4").languages]
    with zipfile.ZipFile(folder / "m15.zip", "w") as archive:
        for lang in langs:
            for side in ("eng", lang):
                archive.writestr(f"m15/train.eng-{lang}.{side}", sentences(side, 200))
    codes = benchmark.load("m4").flores_codes()
    flores = {
        f"flores200_dataset/{split}/{code}.{split}": sentences(lang, size)
        for split, size in (("dev", 30), ("devtest", 40))
        for lang, code in codes.items()
    }
    (folder / "flores.tar.gz").write_bytes(tar_gz(flores))
    target = tmp_path / "data"
    with FaultyServer(folder) as server:
        training = ["--base-url", server.url + "m15.zip"]
        if at_hand:
            training = ["--from", folder / "m15.zip"]
        run(
            *("--benchmark", "m4", "--to", target, "--flores-url", server.url + "flores.tar.gz"),
            *(*training, "--vocab-size", 60, "--workers", 1),
        )
    msa = {name: (target / "work/clean" / name).read_text() for name in ("valid.eng-msa.msa",)}
    assert msa == {"valid.eng-msa.msa": sentences("msa", 30)}
    assert len(list(target.glob("test.*.idx"))) == 8


# --------------------------------------------------------------------------------------
# real text


def directions_of(data, split):
    pairs = {path.name.split(".")[1] for path in data.glob(f"{split}.*.idx")}
    return sorted(d for pair in pairs for d in (pair, "-".join(reversed(pair.split("-")))))


def train(data, folder, max_update, **options):
    return toy_task.train(
        data,
        folder,
        *CHECKPOINT_OPTIONS,
        lang_pairs=",".join(directions_of(data, "train")),
        max_update=max_update,
        max_tokens=None,
        smoe_strata="2-2",
        **options,
    )


@pytest.mark.slow
@pytest.mark.skipif(not OPUS_GETTEXT.exists(), reason=f"no {OPUS_GETTEXT}")
def test_98_pairs_in_the_layout_of_opus100(tmp_path):
    """Tiny pairs too: 26 sentences of ``mt``, and none to test on."""
    data = tmp_path / "data"
    run(
        *("--benchmark", "opus100", "--with-train-only-pairs", "--skip-missing"),
        *("--from", OPUS_GETTEXT, "--to", data, "--vocab-size", 8000, "--sample-lines", 50_000),
    )
    assert len(directions_of(data, "train")) == 196
    assert len(directions_of(data, "test")) == 194
    outcome = train(data, tmp_path / "model", 2, sampling_temperature=5)
    assert outcome.log("train")[-1]["train_num_updates"] == 2
    translations = toy_task.generate(
        data, tmp_path / "model/checkpoint_last.pt", "no-en", "--beam", "1", "--max-len-b", "3"
    )
    assert len(translations.sentences) == 6


def generate_all(data, checkpoint, split_lines):
    """fairseq-generate in every direction, two at a time; checks that no sentence is missing."""

    def generate(direction):
        options = ["--beam", "1", "--max-len-a", "0", "--max-len-b", "4", "--max-tokens", "8000"]
        translations = toy_task.generate(data, checkpoint, direction, *options)
        assert len(translations.sentences) == split_lines[direction], direction

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generate, split_lines))


@pytest.mark.slow
@pytest.mark.skipif(not CORPORA.exists(), reason=f"no {CORPORA}")
@pytest.mark.parametrize(
    "script, options, directions, tested",
    [
        ("m4", [M15], 8, 8),
        ("m15", [M15], 30, 30),
        ("opus100", [OPUS_GETTEXT, "--with-train-only-pairs", "--skip-missing"], 196, 194),
    ],
)
def test_a_benchmark_trains_and_translates_in_every_direction(
    script, options, directions, tested, tmp_path
):
    """The scripts as they are, vocabularies of full size; takes up to half an hour each."""
    data = tmp_path / "data"
    subprocess.run(
        ["bash", f"data-prep/{script}.sh", data, "--from", *map(str, options)],
        cwd=toy_task.REPOSITORY,
        env=toy_task.environment(),
        check=True,
    )
    trained = directions_of(data, "train")
    assert len(trained) == directions
    train(data, tmp_path / "model", 20, sampling_temperature=benchmark.load(script).temperature)
    report = (data / "report.md").read_text()
    rows = re.findall(r"^\| (\w+)-(\w+) \| [\d,]+ \| [\d,]+ \| ([\d,]+) \|", report, re.MULTILINE)
    lines = {}
    for first, second, number in rows:
        if number != "0":
            for direction in (f"{first}-{second}", f"{second}-{first}"):
                lines[direction] = int(number.replace(",", ""))
    assert len(lines) == tested
    generate_all(data, tmp_path / "model/checkpoint_last.pt", lines)
