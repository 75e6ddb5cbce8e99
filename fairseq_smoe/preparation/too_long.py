"""Sentences with more tokens than a model takes. The data keeps them; training cannot."""

import sys

import numpy as np

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.check import POSITIONS
from fairseq_smoe.preparation.binary import read_sizes

FAIRSEQ_POSITIONS = 1024  # fairseq's default for both sides
MOST_WARNINGS = 10


def longest_accepted(plan):
    """Most tokens of a sentence, its end and the language's token included.

    Both directions of a pair are trained, so that a sentence has to fit on both sides.
    """
    if not plan.benchmark:
        return FAIRSEQ_POSITIONS
    training = benchmarks.load(plan.benchmark).training
    return min(int(training[option][0]) for option in POSITIONS)


def find_too_long(plan, cleaning):
    """The sentences that are longer than :func:`longest_accepted`.

    Args:
        cleaning: ``{pair: {split: counts}}``, the summary of the step clean.

    Returns:
        ``{"limit": tokens, "train": {pair: pairs of lines with such a sentence}, "held_out":
        [{"split", "pair", "file", "line", "pieces"}, ...]}``; ``file`` is the path of the text,
        and lines are counted from 1.
    """
    limit = longest_accepted(plan)
    train, held_out = {}, []
    for pair, splits in cleaning.items():
        for split, counts in splits.items():
            lines = counts["kept"]["lines"]
            too_long = np.zeros(lines, dtype=bool)  # on either side
            for lang in pair.split("-") if lines else ():
                name = f"{split}.{pair}.{lang}"
                pieces = _pieces(plan, name, lines)
                # the sentence's end and the language's token are not among the pieces
                mine = pieces > limit - 2
                too_long |= mine
                if split != "train":
                    facts = {"split": split, "pair": pair, "file": _text(plan, name, counts)}
                    held_out += [
                        {**facts, "line": int(i) + 1, "pieces": int(pieces[i])}
                        for i in np.flatnonzero(mine)
                    ]
            if split == "train":
                train[pair] = int(too_long.sum())
    return {"limit": limit, "train": train, "held_out": held_out}


def warn(found):
    """Print the sentences that :func:`find_too_long` found."""
    remedy = f"raise {' and '.join(POSITIONS)} when you train, or shorten"
    for entry in found["held_out"][:MOST_WARNINGS]:
        _say(
            f"{entry['file']}: line {entry['line']} ({entry['split']}, {entry['pair']}) has "
            f"{entry['pieces']:,} pieces, and {_limit_in_words(found)}; {remedy} the line"
        )
    if len(found["held_out"]) > MOST_WARNINGS:
        more = len(found["held_out"]) - MOST_WARNINGS
        _say(f"{more:,} more lines to validate or test on are too long; report.md has all")
    if number := sum(found["train"].values()):
        _say(
            f"pairs of training sentences with a side that is too long: {number:,}; training "
            f"skips them, as {_limit_in_words(found)}"
        )


def in_words(found):
    """Paragraphs for the report."""
    limit = _limit_in_words(found)
    if number := sum(found["train"].values()):
        yield f"Pairs of training sentences that training skips, as {limit}: {number:,}."
    if found["held_out"]:
        yield f"Longer than a model takes, text to validate and test on ({limit}):"
        yield "\n".join(
            f"* {entry['file']}, line {entry['line']:,} ({entry['split']}, {entry['pair']}): "
            f"{entry['pieces']:,} pieces"
            for entry in found["held_out"]
        )


def _limit_in_words(found):
    return (
        f"a model with {found['limit']:,} positions takes {found['limit'] - 2:,} pieces beside the "
        "language's token and the end"
    )


def _pieces(plan, name, lines):
    """Pieces of each line of the text file ``name``, in its order over all shards."""
    files = plan.shards(name, lines)
    pieces = np.empty(lines, dtype=np.int32)
    for i, file in enumerate(files):
        pieces[i :: len(files)] = read_sizes(f"{file}.idx") - 1
    return pieces


def _text(plan, name, counts):
    """The file that the user gave; if lines of it were dropped, the one that has the rest."""
    if counts["invalid_utf8"]["lines"]:
        return str(plan.target / f"{name}.txt")
    return str((plan.raw / name).resolve())


def _say(line):
    print(f"warning: {line}", file=sys.stderr)
