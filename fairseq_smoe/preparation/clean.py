"""Dropping pairs of sentences from the training text.

Every rule has an option and a count. A pair that breaks several rules is counted under the first of
them in the order of ``RULES``. Validation and test text is not cleaned, so that scores remain
comparable.
"""

import json
import re
import unicodedata
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
BLOCK_LINES = 100_000


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


def read_pairs(paths, repaired=None):
    """Blocks of pairs of lines of two parallel files, as :func:`tidy` returns them."""
    with open(paths[0], "rb") as first, open(paths[1], "rb") as second:
        lines = zip(first, second, strict=True)
        while block := list(islice(lines, BLOCK_LINES)):
            yield [(tidy(a, repaired), tidy(b, repaired)) for a, b in block]


def write_held_out(paths, target):
    """Write the sorted fingerprints of all sentences of some files to ``target`` (.npy)."""
    found = set()
    for path in paths:
        with open(path, "rb") as handle:
            found.update(fingerprint(normalise(tidy(line) or "")) for line in handle)
    found.discard(fingerprint(""))
    with whole_file(target) as handle:
        np.save(handle, np.array(sorted(found), dtype=np.uint64))


def clean_training_text(paths, targets, rules, held_out):
    """Write the pairs of lines that break no rule.

    Args:
        paths, targets: two files each.
        held_out: for each side the file of :func:`write_held_out` for its language.

    Returns:
        ``{"kept" or name of a rule: {"lines": ..., "words": ...}}``; words are counted at white
        space and over both sides. Of the pairs kept, ``"in_held_out"`` has those with a side in
        the held-out text; ``"repaired"`` has the lines that :func:`tidy` changed.
    """
    known = [np.load(path) for path in held_out]
    verdicts, overlaps, hashes, words, repaired = [], [], [], [], []
    for pairs in read_pairs(paths, repaired):
        verdict = np.array([broken_by(rules, *pair) for pair in pairs], dtype=np.uint8)
        keys = [[normalise(text or "") for text in side] for side in zip(*pairs)]
        overlap = np.zeros(len(pairs), dtype=bool)
        for side, sentences in zip(keys, known):
            marks = np.array([fingerprint(key) for key in side], dtype=np.uint64)
            overlap |= np.isin(marks, sentences)
        if rules.held_out == "drop":
            verdict[(verdict == KEPT) & overlap] = RULES.index("held_out")
        overlaps.append(overlap)
        if rules.duplicates == "drop":
            hashes.append(np.array([fingerprint(f"{a}\n{b}") for a, b in pairs], dtype=np.uint64))
        verdicts.append(verdict)
        words.append(np.array([a.count(" ") + b.count(" ") + 2 for a, b in zip(*keys)], np.int32))
    verdict, overlap, words = (
        np.concatenate(blocks or [np.empty(0, int)]) for blocks in (verdicts, overlaps, words)
    )
    if hashes:
        candidates = np.flatnonzero(verdict == KEPT)
        _, firsts = np.unique(np.concatenate(hashes)[candidates], return_index=True)
        repeated = np.ones(len(candidates), dtype=bool)
        repeated[firsts] = False
        verdict[candidates[repeated]] = RULES.index("duplicate")
    _write_kept(paths, targets, verdict == KEPT)
    chosen = {name: verdict == code for code, name in enumerate((*RULES, "kept"))}
    chosen["in_held_out"] = chosen["kept"] & overlap.astype(bool)
    counts = {
        name: {"lines": int(lines.sum()), "words": int(words[lines].sum())}
        for name, lines in chosen.items()
    }
    return {**counts, "repaired": {"lines": len(repaired)}}


def _write_kept(paths, targets, keep):
    with whole_file(targets[0]) as first, whole_file(targets[1]) as second:
        start = 0
        for pairs in read_pairs(paths):
            block = keep[start : start + len(pairs)]
            start += len(pairs)
            for handle, side in ((first, 0), (second, 1)):
                kept = [pair[side] + "\n" for pair, good in zip(pairs, block) if good]
                handle.write("".join(kept).encode("utf-8"))


def tidy_held_out_text(paths, targets):
    """Write all pairs of lines but those that are not UTF-8; returns counts as above."""
    repaired = []
    pairs = [pair for block in read_pairs(paths, repaired) for pair in block]
    good = [pair for pair in pairs if None not in pair]
    for side, target in enumerate(targets):
        with whole_file(target) as handle:
            handle.write("".join(pair[side] + "\n" for pair in good).encode("utf-8"))
    words = sum(len(text.split()) for pair in good for text in pair)
    return {
        "kept": {"lines": len(good), "words": words},
        "invalid_utf8": {"lines": len(pairs) - len(good), "words": 0},
        "repaired": {"lines": len(repaired)},
    }


def clean_pair(pair, raw, folder, splits, rules):
    """Clean all splits of a language pair.

    Returns:
        ``{split: counts}``, which is also written to ``PAIR.json``.

    Raises:
        OptionError: no training text is left.
    """
    summary = folder / f"{pair}.json"
    if summary.exists():
        counts = json.loads(summary.read_text(encoding="utf-8"))
        if is_current(counts):
            return counts
    langs, counts = pair.split("-"), {}
    for split in splits:
        paths = [raw / f"{split}.{pair}.{lang}" for lang in langs]
        targets = [folder / path.name for path in paths]
        if split == "train":
            held_out = [folder / f"held-out.{lang}.npy" for lang in langs]
            counts[split] = clean_training_text(paths, targets, rules, held_out)
        else:
            counts[split] = tidy_held_out_text(paths, targets)
    if counts["train"]["kept"]["lines"] == 0:
        lines = {rule: counts["train"][rule]["lines"] for rule in RULES}
        dropped = ", ".join(f"{number} {rule}" for rule, number in lines.items() if number)
        raise OptionError(
            f"--pairs {pair}: no training text is left after cleaning ({dropped}); leave the "
            "pair out with --redo fetch, or relax the rules with --redo clean"
        )
    write_whole(summary, json.dumps(counts, indent=1) + "\n")
    return counts


def is_current(counts):
    """Whether the counts of a pair have all entries, and are not of an earlier version."""
    return all("repaired" in count for count in counts.values())
