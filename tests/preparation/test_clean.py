"""The cleaning rules, against a plain reference that reads everything at once."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.benchmarks.cleaning import CLEANINGS, Rules
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import clean
from fairseq_smoe.preparation.clean import clean_pair, write_held_out
from fairseq_smoe.preparation.clean_pairs import clean_large_pairs
from fairseq_smoe.preparation.large_pairs import LargePair
from fairseq_smoe.preparation.pool import ProcessPool

# few words, so that examples hold equal sides, duplicates and held-out sentences
WORDS = ["a", "A  b", "ab", "c" * 30, "", "ａ", "d e", "ee", "a\x00b", "\ufeffa", "a\u2028", "\r"]
LINES = st.lists(st.sampled_from(WORDS), max_size=25)


def write(folder, name, lines):
    path = folder / name
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def clean_texts(folder, train, held_out=((), ()), rules=Rules(), piece_lines=None):
    """Clean ``[(first, second), ...]``; returns the pairs kept and the counts.

    Args:
        piece_lines: None for a single job, or the lines of a piece.
    """
    raw, out = folder / "raw", folder / "clean"
    raw.mkdir()
    out.mkdir()
    for i, (lang, lines) in enumerate(zip(("0", "1"), held_out)):
        write(raw, f"train.0-1.{lang}", [pair[i] for pair in train])
        write_held_out([write(raw, f"held-out.{lang}", lines)], out / f"held-out.{lang}.npy")
    paths, targets = clean.files_of("train", "0-1", raw, out)
    if piece_lines:
        large = LargePair("0-1", raw, out, piece_lines)
        found = clean_large_pairs([large], rules, {"0-1": ["train"]}, ProcessPool(1))
        counts = found["0-1"]["train"]
        assert not large.folder.exists()
    else:
        known = clean.held_out_files("0-1", out)
        counts = clean.clean_training_text(paths, targets, rules, known)
    sides = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in targets]
    return list(zip(*sides)), {name: count["lines"] for name, count in counts.items()}


def reference(train, held_out, rules):
    """Pairs kept, and how many each rule drops; one pair after the other."""

    def key(text):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        return " ".join(folded.split())

    def in_held_out(pair):
        return any(key(text) in lines for text, lines in zip(pair, known))

    known = [{key(tidied(line)) for line in lines} - {""} for lines in held_out]
    kept, counts = [], dict.fromkeys((*clean.RULES, "kept"), 0)
    counts["repaired"] = sum(tidied(text) != text.strip() for pair in train for text in pair)
    for pair in train:
        pair = tuple(tidied(text) for text in pair)
        shorter, longer = sorted(map(len, pair))
        if rules.empty == "drop" and "" in pair:
            verdict = "empty"
        elif rules.identical == "drop" and pair[0] == pair[1]:
            verdict = "identical"
        elif longer > (rules.max_length or longer):
            verdict = "too_long"
        elif rules.max_length_ratio and longer > rules.max_length_ratio * max(shorter, 1):
            verdict = "length_ratio"
        elif rules.held_out == "drop" and in_held_out(pair):
            verdict = "held_out"
        elif rules.duplicates == "drop" and pair in kept:
            verdict = "duplicate"
        else:
            verdict = "kept"
            kept.append(pair)
        counts[verdict] += 1
    counts["in_held_out"] = sum(map(in_held_out, kept))
    return kept, counts


def tidied(text):
    return text.removeprefix("\ufeff").replace("\x00", " ").strip()


@given(
    st.lists(LINES, min_size=4, max_size=4),
    st.builds(
        Rules,
        empty=st.sampled_from(["drop", "keep"]),
        identical=st.sampled_from(["drop", "keep"]),
        max_length=st.sampled_from([0, 3, 1000]),
        max_length_ratio=st.sampled_from([0, 2.5, 9]),
        held_out=st.sampled_from(["drop", "keep"]),
        duplicates=st.sampled_from(["drop", "keep"]),
    ),
    st.sampled_from([1, 9, 100_000]),
    st.sampled_from([None, 1, 3, 1000]),
)
@settings(max_examples=150, deadline=None)
def test_rules_agree_with_a_plain_reference(
    tmp_path_factory, columns, rules, block_bytes, piece_lines
):
    train = list(zip(columns[0], columns[1]))
    held_out = columns[2:]
    kept, counts = reference(train, held_out, rules)
    if piece_lines and not kept:
        return  # an error, see below
    folder = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clean, "BLOCK_BYTES", block_bytes)
        assert clean_texts(folder, train, held_out, rules, piece_lines) == (kept, counts)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=12)


@given(
    st.lists(st.tuples(TEXT | st.sampled_from(WORDS), TEXT | st.sampled_from(WORDS)), max_size=30),
    LINES,
    LINES,
)
@settings(max_examples=150, deadline=None)
def test_uncleaned_text_comes_out_line_for_line(tmp_path_factory, train, first, second):
    """But for white space at the ends, separators inside a line, and pairs with an empty side."""
    expected = []
    for pair in train:
        sides = [text.removeprefix("\ufeff") for text in pair]
        for character in [*map(chr, range(32)), "\x7f", "\x85", "\u2028", "\u2029"]:
            sides = [text.replace(character, "\n") for text in sides]
        sides = tuple(re.sub("\n+", " ", text).strip() for text in sides)
        expected += [sides] if all(sides) else []
    folder = tmp_path_factory.mktemp("clean")
    kept, counts = clean_texts(folder, train, (first, second), CLEANINGS["none"])
    assert kept == expected
    assert counts["kept"] + counts["empty"] == len(train)
    _, reference_counts = reference(expected, (first, second), CLEANINGS["none"])
    assert counts["in_held_out"] == reference_counts["in_held_out"]


def test_every_rule_has_a_count(tmp_path):
    train = [
        (b"caf\xe9", "not UTF-8"),
        ("nothing", "  "),
        ("OK", "OK"),
        ("long", "x" * 11),
        ("a", "bbbbbb"),
        ("known  Sentence", "bekannt"),
        ("new", "neu"),
        ("new", "neu"),
    ]
    rules = Rules(invalid_utf8="drop", max_length=15, max_length_ratio=5)
    train[3] = ("long", "x" * 16)
    kept, counts = clean_texts(tmp_path, train, (["Known sentence"], []), rules)
    assert kept == [("new", "neu")]
    assert counts == {**dict.fromkeys((*clean.RULES, "kept"), 1), "in_held_out": 0, "repaired": 0}


def test_control_characters_do_not_split_sentences(tmp_path):
    kept, _ = clean_texts(tmp_path, [("one\rtwo\x85three\u2028four\r", "\ufeffeins\x00zwei\tdrei")])
    assert kept == [("one two three four", "eins zwei drei")]


def test_words_are_counted_on_both_sides(tmp_path):
    paths = [write(tmp_path, "a", ["one two"]), write(tmp_path, "b", ["eins zwei drei"])]
    known = [tmp_path / "none.npy"] * 2
    write_held_out([], known[0])
    counts = clean.clean_training_text(paths, [tmp_path / "c", tmp_path / "d"], Rules(), known)
    assert counts["kept"] == {"lines": 1, "words": 5}


def test_text_to_test_on_is_left_alone(tmp_path):
    train, test = [("a b", "c d")], [("x", "x"), ("x", "x"), ("", "y"), ("z" * 2000, "")]
    for split, pairs in (("train", train), ("test", test)):
        for i, lang in enumerate(("en", "de")):
            write(tmp_path, f"{split}.en-de.{lang}", [pair[i] for pair in pairs])
    folder = tmp_path / "clean"
    folder.mkdir()
    for lang in ("en", "de"):
        write_held_out([tmp_path / f"test.en-de.{lang}"], folder / f"held-out.{lang}.npy")
    clean_pair("en-de", tmp_path, folder, ["train", "test"], Rules())
    for lang in ("en", "de"):
        name = f"test.en-de.{lang}"
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_pair_without_training_text_is_named(tmp_path):
    for lang in ("en", "de"):
        write(tmp_path, f"train.en-de.{lang}", ["same"])
        np.save(tmp_path / f"held-out.{lang}.npy", np.empty(0, np.uint64))
    with pytest.raises(OptionError, match=r"--pairs en-de: no training text .*\(1 identical\)"):
        clean_pair("en-de", tmp_path, tmp_path, ["train"], Rules())
