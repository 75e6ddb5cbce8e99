"""Run folders: where a training keeps its checkpoints, log and evaluations."""

import json
from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.errors import OptionError

RUN_FILE = "run.json"
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Run:
    """A training and its folder.

    Attributes:
        folder: holds ``checkpoints/``, ``train.log``, ``evaluation/``, ``analysis/``.
        facts: content of ``run.json``: benchmark, row, scale, seed, data and its
            cleaning, command; {} for a folder
            without it, as of a user's own training.
    """

    folder: Path
    facts: dict

    @property
    def name(self):
        return self.folder.name

    @property
    def checkpoints(self):
        return self.folder / "checkpoints"

    @property
    def benchmark(self):
        """The :class:`~fairseq_smoe.benchmarks.benchmark.Benchmark`, or None."""
        return benchmarks.load(self.facts["benchmark"]) if self.facts else None

    @property
    def row(self):
        """The :class:`~fairseq_smoe.benchmarks.benchmark.Row`, or None."""
        return self.benchmark.row(self.facts["row"]) if self.facts else None


def comma_separated(text):
    """Type for argparse: the words of ``a,b,c``."""
    return [word for word in text.split(",") if word]


def add_row_arguments(parser, optional=False):
    """Add BENCHMARK ROW, and the options that choose among the row's trainings.

    Args:
        optional: whether BENCHMARK ROW may be left out, because --run names a folder instead.
    """
    nargs = "?" if optional else None
    parser.add_argument(
        "benchmark", nargs=nargs, help=f"{', '.join(benchmarks.NAMES)}, or a .json file like theirs"
    )
    parser.add_argument(
        "row", nargs=nargs, help='as in the table, or like "vanilla-moe"; a wrong name lists all'
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="paper",
        help="the paper's sizes, or smaller ones (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="as of fairseq-train (default: %(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of all trainings; that of a row is DIR/BENCHMARK-SCALE/ROW-seedSEED "
        "(default: %(default)s)",
    )


def add_model_arguments(parser):
    """Add the arguments that name a trained model: BENCHMARK ROW or --run, checkpoint and data."""
    add_row_arguments(parser, optional=True)
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="instead of BENCHMARK ROW: folder of a model of your own, with checkpoints/",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="checkpoint to use (default: checkpoints/checkpoint_best.pt in the run's folder)",
    )
    parser.add_argument(
        "--moe-modules",
        metavar="MODULE,...",
        help="modules with gates or experts of your own that the checkpoint uses (docs/extend.md)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="binarised data (default: that of the training)"
    )


def run_folder(runs, benchmark, row, scale, seed):
    """The folder of a row's training: ``runs/m4-small/vanilla-moe-seed42``."""
    return Path(runs) / f"{benchmark.name}-{scale}" / f"{row.slug}-seed{seed}"


def read_run(folder):
    """The :class:`Run` of a folder.

    Raises:
        OptionError: there is no such folder, or its run.json cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such run; train it first: python -m fairseq_smoe train")
    path = folder / RUN_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise OptionError(f"{path}: is no JSON ({error}); train again, or remove it") from error
    if not isinstance(facts, dict):
        raise OptionError(f"{path}: holds no object, {{...}}; train again, or remove it")
    return Run(folder, facts)


def find_run(args):
    """The :class:`Run` that BENCHMARK ROW and the options of :func:`add_row_arguments` name.

    Raises:
        OptionError: unknown benchmark or row, or it has not been trained.
    """
    benchmark = benchmarks.load(args.benchmark)
    row = benchmark.row(args.row)
    folder = run_folder(args.runs, benchmark, row, args.scale, args.seed)
    if not folder.is_dir():
        raise OptionError(f"{folder}: no such run; {_remedy(args, row)}")
    return read_run(folder)


def find_training(args):
    """The :class:`Run` that the options of :func:`add_model_arguments` name.

    Raises:
        OptionError: there is none, or more or less than one is asked for.
    """
    if args.run is not None:
        if args.benchmark:
            raise OptionError(f"--run {args.run}: give either this or BENCHMARK ROW")
        return read_run(args.run)
    if not args.benchmark:
        raise OptionError(
            f"give BENCHMARK ROW, where BENCHMARK is one of {', '.join(benchmarks.NAMES)}, or the "
            "folder of a model of your own with --run"
        )
    if not args.row:
        rows = ", ".join(row.slug for row in benchmarks.load(args.benchmark).rows)
        raise OptionError(f"{args.benchmark}: give one of its rows, too: {rows}")
    return find_run(args)


def find_checkpoint(args, training):
    """The checkpoint that the options of :func:`add_model_arguments` name.

    Raises:
        OptionError: there is none.
    """
    path = args.checkpoint or training.checkpoints / "checkpoint_best.pt"
    if path.is_file():
        return path
    if args.benchmark:
        remedy = _remedy(args, benchmarks.load(args.benchmark).row(args.row))
    else:
        remedy = f"train it first: fairseq-train --save-dir {training.checkpoints}"
    others = sorted(training.checkpoints.glob("checkpoint*.pt"))
    if others:
        remedy = f"choose one with --checkpoint, e.g. {others[-1]}, or {remedy}"
    raise OptionError(f"{path}: no such checkpoint; {remedy}")


def _remedy(args, row):
    return (
        f"train it first: bash scripts/train.sh {args.benchmark} {row.slug} --scale {args.scale} "
        f"--seed {args.seed} --runs {args.runs}"
    )
