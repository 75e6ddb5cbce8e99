"""Binary files, byte by byte against fairseq-preprocess."""

import random

import numpy as np
import pytest
import sentencepiece as spm
import toy_task
from fairseq.data import indexed_dataset
from hypothesis import given
from hypothesis import strategies as st

from fairseq_smoe.preparation import binary
from fairseq_smoe.preparation.clean import tidy
from fairseq_smoe.preparation.vocabulary import (
    joint_symbols,
    train_sentencepiece,
    write_dictionary,
)

NASTY = [
    "",
    "<s> <pad> </s> <unk> __en__ __de__",
    "▁ ▁▁ a▁b",
    "unknown: 漢字 and 🐟🐟 and \u0300 alone",
    "non-breaking\u00a0space, ideographic\u3000space, zero\u200bwidth",
    "line\u2028separator next\u0085line form\ffeed",
    "x" * 5000,
    "e\u0301 ﬁ Ⅷ ㎏",
]


def random_lines(number):
    """Lines of letters that a model may or may not know, of all planes of Unicode."""
    rng = random.Random(0)
    planes = [(0x20, 0x7F), (0xA0, 0x250), (0x400, 0x500), (0x0, 0x10FFFF)]
    lines = []
    for _ in range(number):
        low, high = rng.choice(planes)
        codes = [rng.randrange(low, high) for _ in range(rng.randrange(30))]
        text = "".join(map(chr, codes)).encode("utf-8", "ignore")
        lines.append(tidy(text.replace(b"\n", b" ")))
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of two languages, a model and a dictionary."""
    folder = tmp_path_factory.mktemp("binary")
    lines = [tidy(line.encode()) for line in NASTY] + random_lines(1500)
    for lang, text in (("en", lines), ("de", lines[::-1])):
        (folder / f"train.en-de.{lang}").write_text("\n".join(text) + "\n", newline="\n")
    known = random.Random(1).choices("word <pad> other __de__ more ﬁne aé".split(), k=5000)
    (folder / "sample").write_text("\n".join(map(" ".join, zip(known[::2], known[1::2]))) + "\n")
    train_sentencepiece(folder / "sample", folder / "spm.model", 27, 1.0)
    model = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    write_dictionary(joint_symbols(model, ["de", "en"]), folder / "dict.txt")
    return folder


def binarise(folder, targets, chunk_lines=400):
    """What the steps encode and binarise do to ``train.en-de.en``."""
    text = folder / "train.en-de.en"
    bounds = binary.chunk_bounds(text, chunk_lines)
    chunks = binary.chunk_files(folder, f"{targets[0].name}-chunk", len(bounds))
    jobs = [(text, start, stop, chunk) for (start, stop), chunk in zip(bounds, chunks)]
    binary.encode_chunks(jobs, folder / "spm.model", folder / "dict.txt", np.dtype(np.uint16))
    return binary.binarise(chunks, targets)


def test_files_are_those_of_the_usual_two_steps(folder):
    model = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for lang in ("en", "de"):
        with open(folder / f"train.en-de.{lang}", newline="\n") as text:
            pieces = model.encode([line.removesuffix("\n") for line in text], out_type=str)
        (folder / f"pieces.en-de.{lang}").write_text(
            "".join(" ".join(line) + "\n" for line in pieces), newline="\n"
        )
    toy_task.run(
        *("fairseq-preprocess", "--source-lang", "en", "--target-lang", "de"),
        *("--trainpref", folder / "pieces.en-de", "--destdir", folder / "stock"),
        *("--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt"),
        own_process=True,
    )
    counts = binarise(folder, [folder / "train"])
    for ending in ("bin", "idx"):
        stock = folder / "stock" / f"train.en-de.en.{ending}"
        assert (folder / f"train.{ending}").read_bytes() == stock.read_bytes()
    assert counts["unknown"] > 100 and counts["lengths"][1] >= 1  # the empty line has its end alone


def test_counts_are_those_of_the_file(folder):
    counts = binarise(folder, [folder / "counted"])
    data = indexed_dataset.make_dataset(str(folder / "counted"), impl="mmap")
    assert counts["lines"] == len(data)
    assert counts["tokens"] == sum(len(line) for line in data)
    assert counts["unknown"] == sum((line == 3).sum().item() for line in data)
    lengths = [min(len(line), binary.MAX_COUNTED_LENGTH) for line in data]
    assert counts["lengths"] == np.bincount(lengths).tolist()


def test_shards_take_turns(folder):
    binarise(folder, [folder / "all"])
    binarise(folder, [folder / f"shard{i}" for i in range(3)])
    whole = indexed_dataset.make_dataset(str(folder / "all"), impl="mmap")
    shards = [
        indexed_dataset.make_dataset(str(folder / f"shard{i}"), impl="mmap") for i in range(3)
    ]
    assert sum(map(len, shards)) == len(whole)
    for i in range(len(whole)):
        assert shards[i % 3][i // 3].equal(whole[i])


@given(st.lists(st.text(alphabet="ab", max_size=5), max_size=40), st.integers(1, 7))
def test_chunks_are_the_file(tmp_path_factory, lines, chunk_lines):
    path = tmp_path_factory.mktemp("chunks") / "text"
    path.write_text("".join(line + "\n" for line in lines))
    data = path.read_bytes()
    chunks = [data[start:stop] for start, stop in binary.chunk_bounds(path, chunk_lines)]
    assert b"".join(chunks) == data
    assert all(chunk.count(b"\n") == chunk_lines for chunk in chunks[:-1])
    assert not chunks or 0 < chunks[-1].count(b"\n") <= chunk_lines


def test_the_type_of_a_token_is_fairseqs():
    for size in (10, 65499, 65500, 10**6):
        assert binary.token_type(size) == indexed_dataset.best_fitting_int_dtype(size)
