"""Published text, from servers on this machine in place of the real ones."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from http_server import FaultyServer

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import recipe, sources, transfer

M4_RECIPE = Path(__file__).parents[2] / "data-prep" / "recipe-m4.txt"
needs_mtdata = pytest.mark.skipif(
    importlib.util.find_spec("mtdata") is None, reason="mtdata is not installed"
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.01)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with FaultyServer(tmp_path / "served") as server:
        yield server


def zip_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def tar_bytes(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def test_table_of_opus100():
    archives = sources.opus100_archives()
    assert len(archives) == len({entry.lang for entry in archives}) == 99
    for entry in archives:
        assert entry.pair == "-".join(sorted((entry.lang, "en")))
        assert entry.archive_bytes > 0 and len(bytes.fromhex(entry.sha256)) == 32
    afrikaans = archives[0]
    assert (afrikaans.lang, afrikaans.train, afrikaans.dev) == ("af", 275512, 2000)


@pytest.fixture
def small_opus100(server, monkeypatch):
    """The server has the archives of two languages; the table has their sizes."""
    entries = []
    for entry in sources.opus100_archives():
        if entry.lang in ("af", "zu"):
            content = tar_bytes({f"opus.{entry.pair}-train.en": f"text of {entry.lang}\n"})
            (server.folder / entry.archive).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            entry = dataclasses.replace(entry, archive_bytes=len(content), sha256=digest)
        entries.append(entry)
    monkeypatch.setattr(sources, "opus100_archives", lambda: entries)
    return server


def test_opus100(small_opus100, tmp_path):
    paths = sources.fetch_opus100(tmp_path / "got", ["en-af", "en-zu"], small_opus100.url)
    again = sources.fetch_opus100(tmp_path / "got", ["af-en", "zu-en"], small_opus100.url[:-1])
    assert paths == again and len(small_opus100.requests) == 2
    names = [f"opus-100-corpus-{pair}-v1.0.tar.gz" for pair in ("af-en", "en-zu")]
    assert [path.name for path in paths] == names
    with tarfile.open(paths[1]) as archive:
        assert archive.getnames() == ["opus.en-zu-train.en"]


def test_opus100_checks_what_it_gets(small_opus100, tmp_path):
    small_opus100.wrong, small_opus100.times_wrong = b"<html>", 2
    with pytest.raises(OptionError, match="af-en-v1.0.tar.gz: expected .* bytes, found 6"):
        sources.fetch_opus100(tmp_path / "got", ["en-af"], small_opus100.url)


@pytest.mark.parametrize("pair", ["en-xx", "af-zu", "en-en", "af", "en-af-zu"])
def test_not_in_opus100(tmp_path, pair):
    with pytest.raises(OptionError, match=f"--pairs {pair}: not in OPUS-100.* af, .* zu"):
        sources.fetch_opus100(tmp_path, [pair])


FLORES = tar_bytes({"flores200_dataset/dev/eng_Latn.dev": "text\n" * 1000})


def test_flores200_damaged_on_the_way_is_fetched_again(server, tmp_path):
    (server.folder / "flores.tar.gz").write_bytes(FLORES)
    server.wrong, server.times_wrong = FLORES[:-5], 1
    path = sources.fetch_flores200(tmp_path / "got", server.url + "flores.tar.gz")
    assert path.read_bytes() == FLORES and len(server.requests) == 2


def test_flores200_damaged_on_the_server(server, tmp_path):
    (server.folder / "flores.tar.gz").write_bytes(FLORES[:-5])
    with pytest.raises(OptionError, match="damaged archive.*fetched twice.*--flores-url") as error:
        sources.fetch_flores200(tmp_path / "got", server.url + "flores.tar.gz")
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "got") == []
    (server.folder / "flores.tar.gz").write_bytes(FLORES)
    sources.fetch_flores200(tmp_path / "got", server.url + "flores.tar.gz")


M15 = zip_bytes({"m15/train.eng-nso.eng": "hello\n", "m15/train.eng-nso.nso": "dumela\n"})


def test_m15_from_an_address(server, tmp_path):
    (server.folder / "bitext").write_bytes(M15)
    path = sources.fetch_m15(tmp_path / "got", server.url + "bitext?download=1")
    assert (path.name, path.read_bytes()) == ("bitext", M15)


def test_m15_is_no_web_page(server, tmp_path):
    (server.folder / "m15.zip").write_bytes(b"<html>")
    with pytest.raises(OptionError, match="expected an archive.*found something else"):
        sources.fetch_m15(tmp_path / "got", server.url + "m15.zip")
    assert os.listdir(tmp_path / "got") == []


@pytest.mark.parametrize("url", ["", "/", "/..", "/../"])
def test_m15_keeps_to_its_folder(server, tmp_path, url):
    with pytest.raises(OptionError, match="404"):
        sources.fetch_m15(tmp_path / "got", server.url.rstrip("/") + url)
    assert os.listdir(tmp_path / "got") == []


@pytest.fixture
def drive(server, monkeypatch, tmp_path):
    """gdown itself, with the server in place of Google Drive."""
    gdown = pytest.importorskip("gdown")
    real = gdown.download
    cookies = str(tmp_path / "cookies.txt")
    monkeypatch.setattr(
        gdown,
        "download",
        lambda id, **options: real(url=server.url + id, cookies_file=cookies, **options),
    )
    return server


def test_m15_from_google_drive(drive, tmp_path):
    (drive.folder / "ID").write_bytes(M15)
    for _ in range(2):
        path = sources.fetch_m15(tmp_path / "got", "gdrive:ID")
    assert (path.name, path.read_bytes()) == ("m15.zip", M15)
    assert len(drive.requests) == 1 and os.listdir(tmp_path / "got") == ["m15.zip"]


def test_m15_from_google_drive_goes_on(drive, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "untested-m15.zipabcd1234.part").write_bytes(M15[:100])  # gdown's
    (drive.folder / "ID").write_bytes(M15)
    assert sources.fetch_m15(tmp_path / "got", "gdrive:ID").read_bytes() == M15
    assert drive.requests[-1] == ("/ID", "bytes=100-")


def test_m15_killed_before_the_test_of_the_archive(drive, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "untested-m15.zip").write_bytes(M15)
    (drive.folder / "ID").write_bytes(b"not needed")
    assert sources.fetch_m15(tmp_path / "got", "gdrive:ID").read_bytes() == M15


@pytest.mark.parametrize("content", [b"<html>quota exceeded</html>", M15[:-30]])
def test_m15_from_google_drive_is_tested(drive, tmp_path, content):
    (drive.folder / "ID").write_bytes(content)
    with pytest.raises(OptionError, match="--base-url gdrive:ID: .*save it as .*m15.zip") as error:
        sources.fetch_m15(tmp_path / "got", "gdrive:ID")
    assert "\n" not in str(error.value) and os.listdir(tmp_path / "got") == []


def test_google_drive_refuses(drive, tmp_path):
    drive.statuses = [403]
    with pytest.raises(OptionError, match="gdrive:ID: 403 .*in a browser and save it as .*m15.zip"):
        sources.fetch_m15(tmp_path / "got", "gdrive:ID")


def test_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(OptionError, match=r"gdown; pip install 'fairseq-smoe\[data\]'"):
        sources.fetch_m15(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"mtdata; pip install 'fairseq-smoe\[data\]'"):
        sources.fetch_recipe(tmp_path, M4_RECIPE, ["eng-nso"])


@pytest.mark.parametrize(
    "line, message",
    [
        ("eng-nso", "line 2: expected PAIR DATASET_ID"),
        ("eng-nso gnome", "line 2: expected PAIR DATASET_ID"),
        ("eng-nso OPUS-gnome-v1-eng-tgl", "line 2: OPUS-gnome-v1-eng-tgl is not of the languages"),
        ("eng-nso OPUS-a-1-eng-nso", "line 2: OPUS-a-1-eng-nso is there a second time"),
    ],
)
def test_wrong_recipes(tmp_path, line, message):
    path = tmp_path / "recipe.txt"
    path.write_text(f"eng-nso\tOPUS-a-1-eng-nso  # comment\n{line}\n")
    with pytest.raises(OptionError, match=f"--recipe {path}, {message}"):
        recipe.read_recipe(path)


def test_recipe_without_a_pair(tmp_path):
    with pytest.raises(OptionError, match="nothing for eng-deu; add lines 'eng-deu DATASET_ID'"):
        sources.fetch_recipe(tmp_path, M4_RECIPE, ["eng-deu"])
    with pytest.raises(OptionError, match="--recipe none.txt: no such file"):
        sources.fetch_recipe(tmp_path, "none.txt", ["eng-deu"])


# mtdata with a part of its index, which takes half a minute to make in full: OPUS's corpora of the
# languages of M4, by mtdata's own code, and data sets on the server of this test
INDEX = """
import pickle, shutil, sys, types
from pathlib import Path
import mtdata
part, real = Path(sys.argv[1]), mtdata.resource_dir
part.mkdir()
shutil.copy(real / "refs.bib", part)
languages = {"en", "nso", "ns", "ms", "tl", "ca"}
with open(real / "opus_index.tsv") as table, open(part / "opus_index.tsv", "w") as out:
    out.writelines(line for line in table if languages.issuperset(line.split()[2:]))
mtdata.resource_dir = part
nothing = types.ModuleType("nothing")
nothing.load_all = lambda index: None
for path in (Path(mtdata.__file__).parent / "index").rglob("*.py"):
    name = ".".join(path.relative_to(Path(mtdata.__file__).parent).with_suffix("").parts)
    if path.stem not in ("__init__", "opus_index"):
        sys.modules[f"mtdata.{name}"] = nothing
from mtdata.index import INDEX, Entry
for argument in sys.argv[2:]:
    did, url, *inside = argument.split()
    INDEX.add_entry(Entry(did, url=url, in_paths=inside or None, in_ext="txt" if inside else None))
with open(mtdata.cached_index_file, "wb") as out:
    pickle.dump(INDEX, out)
"""


def make_index(cache, *entries):
    cache.mkdir(parents=True)
    command = [sys.executable, "-c", INDEX, str(cache / "resources"), *entries]
    subprocess.run(command, env={**os.environ, "MTDATA": str(cache)}, check=True)


@needs_mtdata
def test_recipe_of_m4_is_in_mtdatas_index(tmp_path):
    make_index(tmp_path / "cache")
    lines = recipe.read_recipe(M4_RECIPE)
    assert set(lines) == {"eng-nso", "eng-msa", "eng-tgl", "eng-cat"}
    names = [name for pair in lines.values() for name in pair]
    unknown = "OPUS-unknown-v1-eng-nso"
    with recipe._mtdata(["-c", recipe._LOCATE, unknown, *names], tmp_path / "cache", "") as output:
        places = output.read()
    assert list(json.loads(places)) == names


@needs_mtdata
def test_recipe(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MTDATA", raising=False)
    one = {"One.en-nso.en": "hello\nempty\n  one  \n", "One.en-nso.nso": "dumela\n\ntee\n"}
    two = {"Two.nso-en.nso": "pedi\u2028ya\n", "Two.nso-en.en": "second\n"}
    (server.folder / "one.zip").write_bytes(zip_bytes(one))
    (server.folder / "two.zip").write_bytes(zip_bytes(two))
    (server.folder / "three.tsv").write_text("tab\ttab nso\textra\n")
    (server.folder / "none.tsv").write_text("\t\n")
    make_index(
        tmp_path / "got" / "mtdata",
        f"Here-one-v1-eng-nso {server.url}one.zip *.en *.nso",
        f"Here-two-v1-nso-eng_GB {server.url}two.zip *.nso *.en",
        f"Here-three-v1-eng-nso {server.url}three.tsv",
        f"Here-none-v1-eng-nso {server.url}none.tsv",
        f"Here-gone-v1-eng-nso {server.url}gone.zip *.en *.nso",
    )
    path = tmp_path / "recipe.txt"

    def fetch(*names):
        path.write_text("# ours\n" + "".join(f"eng-nso {name}\n" for name in names))
        folder = sources.fetch_recipe(tmp_path / "got", path, ["eng-nso"], connections=1)
        return [(folder / f"train.eng-nso.{lang}").read_bytes() for lang in ("eng", "nso")]

    names = ["Here-one-v1-eng-nso", "Here-two-v1-nso-eng_GB", "Here-three-v1-eng-nso"]
    server.cut_after, server.cuts = 100, 1  # mtdata itself would give up
    text = fetch(*names)
    assert text == [
        b"hello\none\nsecond\ntab\n",
        "dumela\ntee\npedi\u2028ya\ntab nso\n".encode(),
    ]
    before = list(server.requests)
    assert len(before) == 4
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_mtdata", None)
        assert fetch(*names) == text  # finished: nothing is run
    assert fetch(names[1])[0] == b"second\n"  # changed: from mtdata's cache
    assert server.requests == before
    for name, message in {
        "Here-gone-v1-eng-nso": f"{server.url}gone.zip: .* 404 .*change line 2 of {path}",
        "Here-nowhere-v1-eng-nso": f"{path}, line 2: mtdata has no data set Here-nowhere",
        "Here-none-v1-eng-nso": f"{path}, line 2: Here-none-v1-eng-nso has no text",
    }.items():
        with pytest.raises(OptionError, match=message) as error:
            fetch(name)
        assert "\n" not in str(error.value)


def test_fetch_of_a_plan(server, small_opus100, tmp_path):
    plan = Namespace(
        downloads=tmp_path / "got",
        benchmark="opus100",
        pairs=("en-af",),
        data_address=server.url,
        connections=1,
    )
    assert [path.name for path in sources.fetch(plan)] == ["opus-100-corpus-af-en-v1.0.tar.gz"]
    (server.folder / "m15.zip").write_bytes(M15)
    (server.folder / "flores.tar.gz").write_bytes(FLORES)
    plan.benchmark, plan.recipe = "m15", None
    plan.data_address, plan.flores_address = server.url + "m15.zip", server.url + "flores.tar.gz"
    names = ["m15.zip", "flores200_dataset.tar.gz"]
    assert [path.name for path in sources.fetch(plan)] == names
