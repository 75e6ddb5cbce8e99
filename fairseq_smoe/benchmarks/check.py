"""Checks of a user's own benchmark."""

import shlex
from collections import Counter

from fairseq_smoe.benchmarks.cleaning import rules_of

POSITIONS = ("--max-source-positions", "--max-target-positions")
REQUIRED_TRAINING = ("--arch", "--moe-freq", *POSITIONS)
SIZES = ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")


def check_benchmark(benchmark):
    """Detect mistakes that would only show later, or never.

    Args:
        benchmark: a :class:`~fairseq_smoe.benchmarks.benchmark.Benchmark`.

    Raises:
        ValueError: says what is wrong.
    """
    for what, names in (
        ("languages", [benchmark.english, *(each.code for each in benchmark.languages)]),
        ("rows", [row.slug for row in benchmark.rows]),
    ):
        if not all(names):
            raise ValueError(f"{what}: one has no letter or digit in its name")
        name, number = Counter(names).most_common(1)[0]
        if number > 1:
            raise ValueError(f"{what}: {name} stands there {number} times; give each its own name")
    for name in ("batch_tokens", "vocab_size"):
        _check_positive(name, getattr(benchmark, name))
    for name in SIZES:
        _check_positive(f"size {name}", benchmark.size.get(name))
    for name in sorted(benchmark.size.keys() - set(SIZES)):
        raise ValueError(f"size: {name} is none of {', '.join(SIZES)}")
    for option, entry in benchmark.training.items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f'training {option}: expected ["VALUE", "where it comes from"]')
    for option in REQUIRED_TRAINING:
        if option not in benchmark.training:
            raise ValueError(f"training: {option} is missing")
    for option in POSITIONS:
        value = benchmark.training[option][0]
        if not (value.isascii() and value.isdigit() and int(value)):
            raise ValueError(f"training {option} {value}: expected a number from 1")
    rules_of(benchmark.clean)
    for row in benchmark.rows:
        try:
            shlex.split(row.options)
        except ValueError as error:
            raise ValueError(f"row {row.name}: options {row.options}: {error}") from error
    known = set(benchmark.directions())
    for column, directions in benchmark.columns().items():
        if not directions or not known.issuperset(directions):
            raise ValueError(f"columns: {column} is no direction and no group of languages")


def _check_positive(name, value):
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value}: expected a number from 1")
