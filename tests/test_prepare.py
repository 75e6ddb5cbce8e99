"""Preparing data: the first command of a new user, on text of a few hundred lines."""

import argparse

import numpy as np
import pytest
import sentencepiece as spm
from fairseq.data import Dictionary, indexed_dataset

from fairseq_smoe import prepare
from fairseq_smoe.errors import OptionError


@pytest.fixture
def text(tmp_path):
    """Parallel text of en-de in ``tmp_path / "text"``."""
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, size in (("train", 300), ("valid", 20), ("test", 20)):
        numbers = rng.integers(0, 50, (size, 4))
        for lang, word in (("en", "word"), ("de", "Wort")):
            lines = [" ".join(f"{word}{n}" for n in line) for line in numbers]
            (folder / f"{split}.en-de.{lang}").write_text("\n".join(lines) + "\n")
    return folder


def run(text, target, **options):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    options = {"pairs": "en-de", "vocab-size": "50", **options}
    words = [w for name, value in options.items() for w in (f"--{name}", *value.split())]
    prepare.run(parser.parse_args(["--from", str(text), "--to", str(target), *words]))


def read_sentences(target, split, lang):
    """Binarised sentences, put back into text by the SentencePiece model."""
    dictionary = Dictionary.load(str(target / "dict.txt"))
    model = spm.SentencePieceProcessor(model_file=str(target / "spm.model"))
    dataset = indexed_dataset.make_dataset(str(target / f"{split}.en-de.{lang}"), impl="mmap")
    return [model.decode(dictionary.string(ids).split()) for ids in dataset]


def test_text_comes_back_from_the_binary_files(text, tmp_path):
    run(text, tmp_path / "data")
    for split in ("train", "valid", "test"):
        for lang in ("en", "de"):
            expected = (text / f"{split}.en-de.{lang}").read_text().splitlines()
            assert read_sentences(tmp_path / "data", split, lang) == expected
    assert (tmp_path / "data" / "langs.txt").read_text() == "de\nen\n"


def test_a_carriage_return_ends_no_sentence(text, tmp_path):
    path = text / "valid.en-de.en"
    path.write_bytes(path.read_bytes().replace(b" ", b"\r", 1).replace(b"\n", b"\r\n"))
    run(text, tmp_path / "data")
    assert len(read_sentences(tmp_path / "data", "valid", "en")) == 20


def test_a_second_call_does_nothing_and_another_one_is_refused(text, tmp_path):
    target = tmp_path / "data"
    run(text, target)
    before = {path: path.stat().st_mtime_ns for path in target.glob("*.bin")}
    run(text, target)
    assert before == {path: path.stat().st_mtime_ns for path in target.glob("*.bin")}
    with pytest.raises(OptionError, match="--vocab-size 40: .* begun with --vocab-size 50; delete"):
        run(text, target, **{"vocab-size": "40"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": "ende"}, "--pairs ende: expected two languages"),
        ({"pairs": "en-nl"}, "train.en-nl.en: no such file"),
        ({"splits": "train=train"}, "--splits: valid is missing"),
        ({"splits": "train=train valid=valid dev=valid"}, "--splits dev=valid: expected"),
        ({"splits": "train=train valid=valid test2=test"}, "--splits test2: name test sets"),
        ({"vocab-size": "9000"}, "--vocab-size 9000: SentencePiece says: .*Vocabulary size too high"),
    ],
)
def test_mistakes_are_named(options, message, text, tmp_path):
    with pytest.raises(OptionError, match=message):
        run(text, tmp_path / "data", **options)
    run(text, tmp_path / "data")  # and cost nothing


def test_files_of_different_length_are_refused(text, tmp_path):
    with open(text / "test.en-de.de", "a") as handle:
        handle.write("Noch eine Zeile\n")
    with pytest.raises(OptionError, match="test.en-de.en has 20 lines, .*test.en-de.de has 21"):
        run(text, tmp_path / "data")
