"""Preparing a few hundred lines of text, and what it leaves."""

import argparse

import numpy as np

from fairseq_smoe.commands import prepare


def contents(folder):
    """``{name: bytes}`` of what training and a reader need: all but work/ and the times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "work" not in path.parts and path.name not in ("steps.json", ".lock")
    }


def write_text(folder, train_lines=300, pair="en-de"):
    """Parallel text of ``pair`` in files named ``SPLIT.PAIR.LANG``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, size in (("train", train_lines), ("valid", 20), ("test", 20)):
        numbers = rng.integers(0, 50, (size, 4))
        for lang, word in zip(pair.split("-"), ("word", "Wort")):
            lines = [" ".join(f"{word}{n}" for n in line) for line in numbers]
            (folder / f"{split}.{pair}.{lang}").write_text("\n".join(lines) + "\n")
    return folder


def words(text, target, **options):
    """The command line; a space in an option's value separates several values."""
    options = {"pairs": "en-de", "vocab-size": "50", "workers": "1", **options}
    more = [w for name, value in options.items() for w in (f"--{name}", *value.split())]
    return ["--from", str(text), "--to", str(target), *more]


def run(text, target, **options):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    prepare.run(parser.parse_args(words(text, target, **options)))
