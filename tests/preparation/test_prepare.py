"""``python -m fairseq_smoe prepare``, a new user's first command, on a few hundred lines."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import sentencepiece as spm
import toy_task
from fairseq.data import Dictionary, indexed_dataset
from prepared_folder import contents, run, words, write_text

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import only_process_in, unfinished, whole_file
from fairseq_smoe.preparation.options import STEPS


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text")


def read_sentences(target, split, lang):
    """Binarised sentences, put back into text by the SentencePiece model."""
    dictionary = Dictionary.load(str(target / "dict.txt"))
    model = spm.SentencePieceProcessor(model_file=str(target / "spm.model"))
    dataset = indexed_dataset.make_dataset(str(target / f"{split}.en-de.{lang}"), impl="mmap")
    return [model.decode(dictionary.string(ids).split()) for ids in dataset]


def test_text_comes_back_from_the_binary_files(text, tmp_path):
    run(text, tmp_path / "data", workers="2")
    for split in ("train", "valid", "test"):
        for lang in ("en", "de"):
            expected = (text / f"{split}.en-de.{lang}").read_text().splitlines()
            assert read_sentences(tmp_path / "data", split, lang) == expected
    assert (tmp_path / "data" / "langs.txt").read_text() == "de\nen\n"


def test_the_report_counts_what_is_there(text, tmp_path):
    with open(text / "train.en-de.en", "a") as en, open(text / "train.en-de.de", "a") as de:
        en.write("same\n\nword1 word2\n")
        de.write("same\nleer\n" + "x" * 2000 + "\n")
    run(text, tmp_path / "data")
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    facts = report["pairs"]["en-de"]
    dropped = {rule: count["lines"] for rule, count in facts["dropped"].items() if count["lines"]}
    assert dropped == {"identical": 1, "empty": 1, "too_long": 1}
    assert (facts["found"], facts["kept"]) == (303, 300)
    assert facts["held_out"] == {"valid": 20, "test": 20}
    assert facts["probability_per_direction"] == 0.5
    for lang, side in facts["sides"].items():
        path = tmp_path / "data" / f"train.en-de.{lang}"
        data = indexed_dataset.make_dataset(str(path), impl="mmap")
        tokens = sum(map(len, data))
        assert side["tokens"] == tokens and side["tokens_per_line"] == tokens / 300
    page = (tmp_path / "data" / "report.md").read_text()
    assert "| too long | 1 | 0.33% | 3 |" in page and "| en-de | 300 | 20 | 20 |" in page
    for picture in ("report-sizes.png", "report-lengths.png"):
        assert f"({picture})" in page
        assert (tmp_path / "data" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_does_nothing_and_another_one_is_refused(text, tmp_path, capsys):
    target = tmp_path / "data"
    run(text, target)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(text, target)
    assert capsys.readouterr().out.count("already complete") == len(STEPS)
    (target / "work/raw/train.en-de.en").unlink()  # what is complete is not looked for again
    run(text, target)
    after = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed <= {"steps.json", ".lock"}
    with pytest.raises(
        OptionError, match="--vocab-size 40: .* begun with --vocab-size 50; .* --redo"
    ):
        run(text, target, **{"vocab-size": "40"})


def test_redo_replaces_a_step_and_those_after_it(text, tmp_path):
    target, fresh = tmp_path / "data", tmp_path / "fresh"
    run(text, target)
    run(text, target, **{"vocab-size": "40", "redo": "sentencepiece"})
    run(text, fresh, **{"vocab-size": "40"})
    assert contents(target) == contents(fresh)
    run(text, target, **{"vocab-size": "40", "redo": "binarise", "lines-per-shard": "100"})
    assert not (target / "train.en-de.en.bin").exists()
    assert sorted(path.name for path in target.glob("shard*")) == [
        "shard000",
        "shard001",
        "shard002",
    ]
    assert (target / "shard002/train.en-de.de.idx").exists()
    assert (target / "valid.en-de.de.idx").exists()


def test_redo_removes_nothing_but_its_own_files(text, tmp_path):
    target = tmp_path / "data"
    run(text, target, **{"lines-per-shard": "100"})
    own = ["reports/mine", "shard0-notes/mine", "shard000/mine", "model.bin", "report-of-mine.docx"]
    own += ["dictionary-en-de.txt", "text.part1.zip"]
    for name in own:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("mine")
    run(text, target, redo="fetch")
    assert all((target / name).read_text() == "mine" for name in own)
    assert not (target / "shard001").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"redo": "binarise"}, "cleaned.json: is gone, and binarise needs it; give --redo fetch"),
        ({"redo": "verify"}, "found.json: is gone"),
        (
            {"redo": "report", "max-length": "500"},
            "--max-length 500: .* with --max-length 1000; give that again, .* --redo fetch",
        ),
    ],
)
def test_a_redo_that_cannot_be_done_removes_nothing(options, message, text, tmp_path):
    target = tmp_path / "data"
    run(text, target)
    before = contents(target)
    shutil.rmtree(target / "work")
    with pytest.raises(OptionError, match=message):
        run(text, target, **options)
    run(text, target)
    assert contents(target) == before
    run(text, target, redo="fetch")
    assert contents(target) == before


def test_a_source_that_is_gone_is_named_before_anything_is_removed(text, tmp_path):
    run(text, tmp_path / "data")
    before = contents(tmp_path / "data")
    text.rename(tmp_path / "moved")
    with pytest.raises(OptionError, match="--from .*text: no such file or folder"):
        run(text, tmp_path / "data", redo="fetch")
    assert contents(tmp_path / "data") == before


def test_text_that_changes_or_vanishes_on_the_way_is_named(text, tmp_path):
    target, path = tmp_path / "data", text / "train.en-de.de"
    lines = path.read_text().splitlines(keepends=True)
    run(text, target, steps="fetch verify")
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(OptionError, match="train.en-de.de: has changed since it was verified"):
        run(text, target)
    path.unlink()
    with pytest.raises(OptionError, match="train.en-de.de: was there, and is gone"):
        run(text, target)
    path.write_text("".join(lines))
    run(text, target, redo="fetch")
    run(text, tmp_path / "undisturbed")
    assert contents(target) == contents(tmp_path / "undisturbed")


def test_a_folder_that_cannot_be_written_is_named(text, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(OptionError, match=f"--to {target}: .*; choose another"):
            run(text, target)


def test_what_is_left_out_is_said(text, tmp_path, capsys):
    path = text / "test.en-de.de"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\xe9\n", 7))
    run(
        text,
        tmp_path / "data",
        pairs="en-de,en-nl",
        **{"invalid-utf8": "drop", "skip-missing": ""},
    )
    assert "so left out: en-nl\n" in capsys.readouterr().out
    page = (tmp_path / "data" / "report.md").read_text()
    assert "no training text was found: en-nl." in page
    assert "not UTF-8: 7 lines." in page


def test_steps_run_one_by_one(text, tmp_path):
    with pytest.raises(OptionError, match="--steps clean: fetch is not complete"):
        run(text, tmp_path / "data", steps="clean")
    for step in STEPS:
        run(text, tmp_path / "data", steps=step)
    run(text, tmp_path / "at once")
    assert contents(tmp_path / "data") == contents(tmp_path / "at once")


def test_the_number_of_processes_does_not_matter(text, tmp_path):
    write_text(text, 700, "en-nl")
    for workers in ("1", "3"):
        run(text, tmp_path / workers, workers=workers, pairs="en-de,en-nl")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_pair_without_text_to_test_on(text, tmp_path):
    write_text(text, 100, "en-nl")
    for split in ("valid", "test"):
        for lang in ("en", "nl"):
            (text / f"{split}.en-nl.{lang}").write_text("")
    run(text, tmp_path / "data", pairs="en-de,en-nl")
    names = {path.name for path in (tmp_path / "data").glob("*.en-nl.*")}
    assert names == {f"train.en-nl.{lang}.{end}" for lang in ("en", "nl") for end in ("bin", "idx")}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": "ende"}, "--pairs ende: expected two different languages"),
        ({"pairs": "en-en"}, "--pairs en-en: expected two different languages"),
        ({"splits": "train=train valid=a valid=b"}, "--splits valid=b: valid is given twice"),
        ({"sample-lines": "3"}, "--sample-lines 3: expected at least 1000"),
        ({"redo": "clean", "steps": "report"}, "--redo clean: is not among --steps report"),
        ({"pairs": "en-de,de-en"}, "--pairs en-de: given twice"),
        ({"pairs": "en-nl"}, "--from .*text: no training text of en-nl; expected train.en-nl"),
        ({"splits": "train=train"}, "--splits: valid is missing"),
        ({"splits": "train=train valid=valid dev=valid"}, "--splits dev=valid: expected"),
        ({"splits": "train=train valid=valid test2=test"}, "--splits test2: name test sets"),
        (
            {"splits": "train=train valid=dev"},
            "no text of split valid, and training needs some; expected dev.en-de",
        ),
        ({"vocab-size": "9000"}, "--vocab-size 9000: SentencePiece says: Vocabulary size too high"),
        ({"vocab-size": "12"}, "--vocab-size 12: SentencePiece says: Vocabulary size is smaller"),
        ({"temperature": "0.5"}, "--temperature 0.5: expected at least 1"),
        ({"character-coverage": "99"}, "--character-coverage 99.0: expected a share"),
        ({"recipe": "list.txt"}, "--recipe list.txt: is for --benchmark m4 or m15 without --from"),
        ({"workers": "0"}, "--workers 0: expected at least 1"),
        ({"max-length": "3"}, "--pairs en-de: no training text is left .*300 too_long"),
    ],
)
def test_mistakes_are_named_and_cost_nothing(options, message, text, tmp_path):
    with pytest.raises(OptionError, match=message):
        run(text, tmp_path / "data", **options)
    run(text, tmp_path / "data", **({"redo": "fetch"} if "max-length" in options else {}))


@pytest.mark.parametrize("empty", [["de"], ["en", "de"]])
def test_empty_training_files_are_named(empty, text, tmp_path):
    for lang in empty:
        (text / f"train.en-de.{lang}").write_text("")
    message = "no training text of en-de" if len(empty) == 2 else "has 300 lines, .* has 0"
    with pytest.raises(OptionError, match=message):
        run(text, tmp_path / "data")


def test_files_of_different_length_are_refused(text, tmp_path):
    with open(text / "test.en-de.de", "a") as handle:
        handle.write("Noch eine Zeile\n")
    with pytest.raises(OptionError, match="test.en-de.en has 20 lines, .*test.en-de.de has 21"):
        run(text, tmp_path / "data")


def test_text_that_is_not_utf8_is_named_or_dropped(text, tmp_path):
    path = text / "valid.en-de.de"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\xe9\n", 7))
    with pytest.raises(
        OptionError, match="valid.en-de.de: line 1 is not UTF-8.*--invalid-utf8 drop"
    ):
        run(text, tmp_path / "data")
    run(text, tmp_path / "data", **{"invalid-utf8": "drop"})
    assert len(read_sentences(tmp_path / "data", "valid", "en")) == 13


def test_one_process_at_a_time(text, tmp_path):
    with only_process_in(tmp_path):
        with pytest.raises(OptionError, match=f"--to {tmp_path}: another process"):
            run(text, tmp_path)
    run(text, tmp_path)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    part = unfinished(tmp_path / "file", os.getpid())
    part.symlink_to("/dev/full")  # every write to it fails for lack of space
    with pytest.raises(OptionError, match="file: the disk is full; free some space and run"):
        with whole_file(tmp_path / "file") as handle:
            handle.write(b"x" * 10)
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_it_stops_and_goes_on_when_there_is_space(text, tmp_path):
    run(text, tmp_path / "undisturbed")
    target = tmp_path / "data"
    target.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(target)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        failures = 0
        for kib in range(64, 2000, 64):  # space for a little more each time
            remount = ["mount", "-o", f"remount,size={kib}k", str(target)]
            subprocess.run(remount, check=True)
            try:
                run(text, target)
                break
            except OptionError as error:
                failures += 1
                assert re.fullmatch("[^\n]*: the disk is full; free some space.*", str(error))
        assert failures >= 5
        assert contents(target) == contents(tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", str(target)], check=True)


def start(text, target, **options):
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fairseq_smoe", "prepare", *words(text, target, **options)],
        env=toy_task.environment(),
        cwd=toy_task.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("step", ["clean ...", "sentencepiece: drawn the sample"])
def test_ctrl_c_stops_in_one_line(step, tmp_path):
    write_text(tmp_path / "text", 200_000)
    write_text(tmp_path / "text", 200_000, "en-nl")
    with start(tmp_path / "text", tmp_path / "data", workers="2", pairs="en-de,en-nl") as process:
        for line in process.stdout:
            if line.startswith(step):
                break
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(3) == 130
        messages = process.stderr.read()
        assert "Traceback" not in messages and messages.endswith("stopped\n")


def test_killed_at_any_time_it_finishes_with_the_same_files(tmp_path):
    """SIGKILL to the command and its workers at random times; then the command once more."""
    text = write_text(tmp_path / "text", 80_000)
    options = {"workers": "2", "vocab-size": "60", "lines-per-shard": "15000"}
    begun = time.monotonic()
    run(text, tmp_path / "undisturbed", **options)
    seconds = time.monotonic() - begun
    target, rng = tmp_path / "data", random.Random(3)
    interrupted = 0
    for pause in [rng.uniform(0.15, 0.45) * seconds for _ in range(9)]:
        process = start(text, target, **options)
        time.sleep(pause)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            interrupted += 1
        process.communicate()
    assert interrupted >= 3
    run(text, target, **options)
    assert contents(target) == contents(tmp_path / "undisturbed")
    assert not list(target.rglob("*.unfinished-*"))


def test_text_to_score_against_lies_beside_the_binary_files(text, tmp_path):
    run(text, tmp_path / "data")
    kept = {p.stem for p in (tmp_path / "data").glob("*.en-de.*.txt")}
    assert kept == {f"{split}.en-de.{lang}" for split in ("valid", "test") for lang in ("en", "de")}
    for name in kept:
        assert (tmp_path / "data" / f"{name}.txt").read_bytes() == (text / name).read_bytes()
        # fairseq would read a text file of this name in the place of the binary ones
        assert not (tmp_path / "data" / name).exists()
    with pytest.raises(OptionError, match="--scale tiny.*--vocab-size"):
        run(text, tmp_path / "other", scale="tiny")
