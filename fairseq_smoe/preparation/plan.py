"""The plan of a preparation: what to prepare, with which options, and in which files."""

import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import Rules, rules_of
from fairseq_smoe.benchmarks.training_command import vocab_size
from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.task_files import SPM_FILE

MOST_PIECES = 1_000_000
PIECES, NEW_PIECES = 32000, 4000  # of a vocabulary; of a language that is added to one
DEFAULT_SPLITS = {"train": "train", "valid": "valid", "test": "test"}


@dataclass(frozen=True)
class Plan:
    """All that the steps need to know."""

    target: Path
    benchmark: str | None
    sources: tuple
    pairs: tuple
    splits: dict
    skip_missing: bool
    recipe: str | None
    data_address: str | None
    flores_address: str
    connections: int
    cleaning: str
    rules: Rules
    vocab_size: int
    character_coverage: float
    temperature: float
    sample_lines: int
    seed: int
    vocabulary_of: str | None
    lines_per_shard: int
    workers: int
    scheduler: str | None
    piece_lines: int

    @property
    def work(self):
        return self.target / "work"

    @property
    def downloads(self):
        return self.work / "downloads"

    @property
    def raw(self):
        return self.work / "raw"

    @property
    def clean(self):
        return self.work / "clean"

    @property
    def ids(self):
        return self.work / "ids"

    @property
    def sample(self):
        return self.work / "sample.txt"

    def summary(self, step):
        """The file with a step's summary of its output."""
        return {
            "fetch": self.raw / "found.json",
            "verify": self.raw / "verified.json",
            "clean": self.clean / "cleaned.json",
            "encode": self.ids / "encoded.json",
            "binarise": self.work / "binarised.json",
        }[step]

    @property
    def model(self):
        return self.target / SPM_FILE

    @property
    def dictionary(self):
        return self.target / "dict.txt"

    def languages(self, pairs):
        return sorted({lang for pair in pairs for lang in pair.split("-")})

    def raw_splits(self):
        """``{pair: its splits}`` of the text found, without empty files, and without pairs that
        have no training text."""

        def has_text(split, pair):
            paths = [self.raw / f"{split}.{pair}.{lang}" for lang in pair.split("-")]
            # a single side is an error that a later check reports
            return all(path.exists() for path in paths) and any(p.stat().st_size for p in paths)

        return {
            pair: [split for split in self.splits if has_text(split, pair)]
            for pair in self.pairs
            if has_text("train", pair)
        }

    def shards(self, name, lines):
        """The binary files, without their endings, of the text file ``SPLIT.PAIR.LANG``."""
        if not self.lines_per_shard or not name.startswith("train."):
            return [self.target / name]
        number = max(1, math.ceil(lines / self.lines_per_shard))
        return [self.target / f"shard{i:03d}" / name for i in range(number)]


def make_plan(args):
    """The plan that the options of ``prepare`` ask for.

    Raises:
        OptionError: names the option that is wrong or missing.
    """
    benchmark = benchmarks.load(args.benchmark) if args.benchmark else None
    if not benchmark and not (args.sources and args.pairs):
        raise OptionError(
            "--benchmark: give m4, m15 or opus100, or the text and languages of your own with "
            "--from DIR --pairs en-de,en-nl"
        )
    if benchmark and args.benchmark not in benchmarks.PAPERS and not args.sources:
        raise OptionError(f"--benchmark {args.benchmark}: give its text with --from")
    if args.scale != "paper" and not benchmark:
        raise OptionError(f"--scale {args.scale}: is for --benchmark; give --vocab-size instead")
    if args.recipe and (args.sources or args.benchmark not in ("m4", "m15")):
        raise OptionError(f"--recipe {args.recipe}: is for --benchmark m4 or m15 without --from")
    if args.pairs:
        pairs = parse_pairs(args.pairs)
        _check_published(benchmark, pairs, args)
    else:
        pairs = benchmark.pairs(args.with_train_only_pairs)
    splits = benchmark.splits if benchmark else DEFAULT_SPLITS
    _check_numbers(args)
    cleaning, rules = _cleaning(args, benchmark)
    return Plan(
        target=Path(args.to).resolve(),
        benchmark=args.benchmark and benchmarks.reference(args.benchmark),
        sources=tuple(str(Path(source).absolute()) for source in args.sources or ()),
        recipe=args.recipe and str(Path(args.recipe).absolute()),
        pairs=tuple(pairs),
        splits=parse_splits(args.splits) if args.splits else splits,
        cleaning=cleaning,
        rules=rules,
        vocab_size=_vocab_size(args, benchmark),
        vocabulary_of=args.vocabulary_of and str(Path(args.vocabulary_of).absolute()),
        temperature=args.temperature or (benchmark.temperature if benchmark else 1),
        **{
            name: getattr(args, name)
            for name in (
                *("skip_missing", "data_address", "flores_address"),
                *("connections", "character_coverage", "sample_lines", "seed"),
                *("lines_per_shard", "workers", "scheduler", "piece_lines"),
            )
        },
    )


def _vocab_size(args, benchmark):
    if args.vocab_size is not None:
        return args.vocab_size
    if args.vocabulary_of:
        return NEW_PIECES
    return vocab_size(benchmark, args.scale) if benchmark else PIECES


def _cleaning(args, benchmark):
    """``(name, rules)`` of the cleaning; see :func:`~fairseq_smoe.benchmarks.cleaning.rules_of`."""
    chosen = args.clean
    if chosen is None:
        # a recipe's corpora are not the text that the benchmark is about
        chosen = benchmark.clean if benchmark and not args.recipe else "default"
    cleaning, rules = rules_of(chosen)
    single = {field.name: getattr(args, field.name) for field in fields(Rules)}
    return cleaning, replace(rules, **{k: v for k, v in single.items() if v is not None})


def _check_published(benchmark, pairs, args):
    """Check that the pairs are published, before gigabytes are downloaded in vain."""
    if benchmark and not args.sources:
        known = [pair.split("-") for pair in benchmark.pairs(train_only=True)]
        for pair in pairs:
            if sorted(pair.split("-")) not in map(sorted, known):
                raise OptionError(
                    f"--pairs {pair}: not in {benchmark.title}, which has "
                    f"{', '.join('-'.join(pair) for pair in known)}; give text of it with --from"
                )


def _check_numbers(args):
    at_least = {
        "vocab_size": 0 if args.vocabulary_of else 10,
        "temperature": 1,
        "sample_lines": 1000,
        "workers": 1,
        "piece_lines": 1,
        "connections": 1,
        "lines_per_shard": 0,
        "max_length": 0,
        "max_length_ratio": 0,
        "seed": 0,
    }
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise OptionError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    if not 0.98 <= args.character_coverage <= 1:  # the range that SentencePiece accepts
        raise OptionError(
            f"--character-coverage {args.character_coverage}: expected a share from 0.98 to 1"
        )
    if (args.vocab_size or 0) > MOST_PIECES:
        raise OptionError(f"--vocab-size {args.vocab_size}: expected at most {MOST_PIECES}")


def parse_pairs(text):
    """``"en-de,en-nl"`` -> ``["en-de", "en-nl"]``"""
    pairs = [pair.strip() for pair in text.split(",")]
    for pair in pairs:
        langs = pair.split("-")
        if len(set(langs)) != 2 or len(langs) != 2 or not re.fullmatch(r"\w+-\w+", pair):
            raise OptionError(
                f"--pairs {pair}: expected two different languages joined by one hyphen, e.g. en-de"
            )
        if pairs.count(pair) + pairs.count("-".join(reversed(pair.split("-")))) > 1:
            raise OptionError(f"--pairs {pair}: given twice; one name stands for both directions")
    return pairs


def parse_splits(words):
    """``["train=train", "valid=dev"]`` -> ``{"train": "train", "valid": "dev"}``"""
    splits = {}
    for word in words:
        name, _, prefix = word.partition("=")
        if not prefix or not (name in ("train", "valid") or name.startswith("test")):
            raise OptionError(
                f"--splits {word}: expected NAME=PREFIX with NAME train, valid, test, test1, ..."
            )
        if name in splits:
            raise OptionError(f"--splits {word}: {name} is given twice; name test sets test1, ...")
        splits[name] = prefix
    tests = [name for name in splits if name.startswith("test")]
    if tests != [f"test{i or ''}" for i in range(len(tests))]:
        raise OptionError(f"--splits {' '.join(tests)}: name test sets test, test1, test2, ...")
    for name in ("train", "valid"):
        if name not in splits:
            raise OptionError(f"--splits: {name} is missing; add {name}=PREFIX")
    return splits
