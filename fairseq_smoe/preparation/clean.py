"""Dropping pairs of sentences from the training text.

Every rule has an option and a count. A pair that breaks several rules is counted under the first of
them in the order of ``RULES``. Validation and test text is not cleaned, so that scores remain
comparable.
"""

import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import whole_file, write_whole

RULES = (
    "invalid_utf8",
    "empty",
    "identical",
    "too_long",
    "length_ratio",
    "held_out",
    "duplicate",
)
KEPT = len(RULES)

# characters that other tools take for the end of a line or word: controls, U+0085, U+2028
_SEPARATORS = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029]+")
BLOCK_BYTES = 4_000_000  # of a side that are in memory as text at a time


def broken_by(rules, first, second):
    """The number of the first rule that a pair breaks by itself, or ``KEPT``."""
    if first is None or second is None:
        return RULES.index("invalid_utf8")
    shorter, longer = sorted((len(first), len(second)))
    if rules.empty == "drop" and shorter == 0:
        return RULES.index("empty")
    if rules.identical == "drop" and first == second:
        return RULES.index("identical")
    if rules.max_length and longer > rules.max_length:
        return RULES.index("too_long")
    if rules.max_length_ratio and longer > rules.max_length_ratio * max(shorter, 1):
        return RULES.index("length_ratio")
    return KEPT


def tidy(line, repaired=None):
    """A line of a file as text, without white space at its ends; None if it is not UTF-8.

    Args:
        repaired: a list to which the line is added if characters in it are replaced or removed.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return None
    stripped = text.strip()
    if text.startswith("\ufeff") or _SEPARATORS.search(stripped):
        if repaired is not None:
            repaired.append(line)
        return _SEPARATORS.sub(" ", text.removeprefix("\ufeff")).strip()
    return stripped


def normalise(text):
    """A key that spellings of one sentence share: width, case and spaces do not count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())  # folding may decompose


def fingerprint(text):
    """64 bits of a hash. In one of 300,000 corpora of 10 million sentences, two agree by chance."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def read_pairs(paths, starts=(0, 0), lines=None, repaired=None):
    """Blocks of pairs of lines of two parallel files, as :func:`tidy` returns them.

    Args:
        starts: byte offsets to begin at.
        lines: number of lines to read (default: all).
        repaired: a counter, whose "lines" counts those that were changed.
    """
    with open(paths[0], "rb") as first, open(paths[1], "rb") as second:
        first.seek(starts[0])
        second.seek(starts[1])
        while lines is None or lines > 0:
            block = first.readlines(BLOCK_BYTES)[:lines]
            if not block:
                return
            changed = []
            pairs = zip(block, islice(second, len(block)), strict=True)
            yield [(tidy(a, changed), tidy(b, changed)) for a, b in pairs]
            if repaired is not None:
                repaired["lines"] += len(changed)
            if lines is not None:
                lines -= len(block)


def write_held_out(paths, target):
    """Write the sorted fingerprints of all sentences of some files to ``target`` (.npy)."""
    found = set()
    for path in paths:
        with open(path, "rb") as handle:
            found.update(fingerprint(normalise(tidy(line) or "")) for line in handle)
    found.discard(fingerprint(""))
    with whole_file(target) as handle:
        np.save(handle, np.array(sorted(found), dtype=np.uint64))


@dataclass(frozen=True)
class Judgement:
    """What is known of N pairs of lines by themselves, without the other lines.

    Attributes:
        verdict_N: uint8, number of the first rule that is broken, or ``KEPT``.
        overlap_N: bool, whether a side is in the held-out text.
        words_N: int32, words of both sides, counted at white space.
        mark_N: uint64 fingerprint of the pair; None if duplicates are kept.
        repaired: number of lines that :func:`tidy` changed.
    """

    verdict_N: np.ndarray
    overlap_N: np.ndarray
    words_N: np.ndarray
    mark_N: np.ndarray | None
    repaired: int


def judge(paths, rules, held_out, starts=(0, 0), lines=None):
    """The :class:`Judgement` of parallel lines.

    Args:
        paths, starts, lines: as for :func:`read_pairs`.
        held_out: for each side the file of :func:`write_held_out` for its language.
    """
    known = [np.load(path) for path in held_out]
    blocks, repaired = [_judge_block([], rules, known)], Counter()
    for pairs in read_pairs(paths, starts, lines, repaired):
        blocks.append(_judge_block(pairs, rules, known))
    columns = [np.concatenate(parts) for parts in zip(*blocks)]
    verdict_N, overlap_N, words_N, mark_N = columns
    marks = mark_N if rules.duplicates == "drop" else None
    return Judgement(verdict_N, overlap_N, words_N, marks, repaired["lines"])


def _judge_block(pairs, rules, known):
    verdict = np.array([broken_by(rules, *pair) for pair in pairs], dtype=np.uint8)
    keys = [[normalise(text or "") for text in side] for side in zip(*pairs)] or [[], []]
    overlap = np.zeros(len(pairs), dtype=bool)
    for side, sentences in zip(keys, known):
        marks = np.array([fingerprint(key) for key in side], dtype=np.uint64)
        overlap |= np.isin(marks, sentences)
    if rules.held_out == "drop":
        verdict[(verdict == KEPT) & overlap] = RULES.index("held_out")
    words = np.array([a.count(" ") + b.count(" ") + 2 for a, b in zip(*keys)], np.int32)
    marked = pairs if rules.duplicates == "drop" else ()
    marks = np.array([fingerprint(f"{a}\n{b}") for a, b in marked], dtype=np.uint64)
    return verdict, overlap, words, marks


def repeats(mark_N):
    """Indices of all but the first of equal marks, in order."""
    _, firsts = np.unique(mark_N, return_index=True)
    repeated_N = np.ones(len(mark_N), dtype=bool)
    repeated_N[firsts] = False
    return np.flatnonzero(repeated_N)


def count_and_write(paths, targets, judged, repeated, starts=(0, 0)):
    """Write the pairs of lines that break no rule.

    Args:
        paths, starts: as for :func:`read_pairs`; two files each.
        targets: the files to write.
        judged: :class:`Judgement` of the lines.
        repeated: indices of those that are equal to an earlier pair.

    Returns:
        ``{"kept" or name of a rule: {"lines": ..., "words": ...}}``. Of the pairs kept,
        ``"in_held_out"`` has those with a side in the held-out text; ``"repaired"`` has the lines
        that :func:`tidy` changed.
    """
    verdict_N = judged.verdict_N.copy()
    verdict_N[repeated] = RULES.index("duplicate")
    keep_N = verdict_N == KEPT
    with whole_file(targets[0]) as first, whole_file(targets[1]) as second:
        start = 0
        for pairs in read_pairs(paths, starts, len(keep_N)):
            kept = [pair for pair, good in zip(pairs, keep_N[start : start + len(pairs)]) if good]
            start += len(pairs)
            for handle, side in ((first, 0), (second, 1)):
                handle.write("".join(pair[side] + "\n" for pair in kept).encode("utf-8"))
    chosen = {name: verdict_N == code for code, name in enumerate((*RULES, "kept"))}
    chosen["in_held_out"] = keep_N & judged.overlap_N
    counts = {
        name: {"lines": int(lines_N.sum()), "words": int(judged.words_N[lines_N].sum())}
        for name, lines_N in chosen.items()
    }
    return {**counts, "repaired": {"lines": judged.repaired}}


def clean_training_text(paths, targets, rules, held_out):
    """Clean a text that is small enough for a few numbers of every line to be in memory. Arguments
    and result as for :func:`judge` and :func:`count_and_write`."""
    judged = judge(paths, rules, held_out)
    repeated = np.empty(0, dtype=np.int64)
    if judged.mark_N is not None:
        candidates = np.flatnonzero(judged.verdict_N == KEPT)
        repeated = candidates[repeats(judged.mark_N[candidates])]
    return count_and_write(paths, targets, judged, repeated)


def tidy_held_out_text(paths, targets):
    """Write all pairs of lines but those that are not UTF-8; returns counts as above."""
    repaired = Counter()
    pairs = [pair for block in read_pairs(paths, repaired=repaired) for pair in block]
    good = [pair for pair in pairs if None not in pair]
    for side, target in enumerate(targets):
        with whole_file(target) as handle:
            handle.write("".join(pair[side] + "\n" for pair in good).encode("utf-8"))
    words = sum(len(text.split()) for pair in good for text in pair)
    return {
        "kept": {"lines": len(good), "words": words},
        "invalid_utf8": {"lines": len(pairs) - len(good), "words": 0},
        "repaired": {"lines": repaired["lines"]},
    }


def clean_pair(pair, raw, folder, splits, rules):
    """Clean all splits of a language pair.

    Returns:
        ``{split: counts}``, which is also written to ``PAIR.json``.

    Raises:
        OptionError: no training text is left.
    """
    counts = read_counts(pair, folder)
    if counts is None:
        paths, targets = files_of("train", pair, raw, folder)
        train = clean_training_text(paths, targets, rules, held_out_files(pair, folder))
        counts = finish_pair(pair, raw, folder, splits, train)
    return counts


def finish_pair(pair, raw, folder, splits, train):
    """Tidy the other splits of a pair whose training text is clean. As :func:`clean_pair`.

    Args:
        train: counts of the training text.
    """
    counts = {"train": train}
    for split in splits:
        if split != "train":
            counts[split] = tidy_held_out_text(*files_of(split, pair, raw, folder))
    if train["kept"]["lines"] == 0:
        lines = {rule: train[rule]["lines"] for rule in RULES}
        dropped = ", ".join(f"{number} {rule}" for rule, number in lines.items() if number)
        raise OptionError(
            f"--pairs {pair}: no training text is left after cleaning ({dropped}); leave the "
            "pair out with --redo fetch, or relax the rules with --redo clean"
        )
    counts = {split: counts[split] for split in splits}
    write_whole(folder / f"{pair}.json", json.dumps(counts, indent=1) + "\n")
    return counts


def files_of(split, pair, raw, folder):
    """``(paths, targets)`` of a pair's split, both sides each."""
    names = [f"{split}.{pair}.{lang}" for lang in pair.split("-")]
    return [raw / name for name in names], [folder / name for name in names]


def held_out_files(pair, folder):
    """For each side the file of :func:`write_held_out`."""
    return [folder / f"held-out.{lang}.npy" for lang in pair.split("-")]


def read_counts(pair, folder):
    """What :func:`clean_pair` has written; None if it has not, or in an earlier version."""
    summary = folder / f"{pair}.json"
    if not summary.exists():
        return None
    counts = json.loads(summary.read_text(encoding="utf-8"))
    return counts if is_current(counts) else None


def is_current(counts):
    """Whether the counts of a pair have all entries, and are not of an earlier version."""
    return all("repaired" in count for count in counts.values())
