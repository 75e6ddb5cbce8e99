"""Run folders: where a training keeps its checkpoints, and what they are."""

import json
from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe import benchmark as benchmarks
from fairseq_smoe.errors import OptionError
from fairseq_smoe.scale import SCALES

RUN_FILE = "run.json"
DEFAULT_SEED = 42


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        folder: holds ``checkpoints/``, ``train.log``, ``evaluation/``, ``analysis/``.
        facts: content of ``run.json``: benchmark, row, scale, seed, data, command; {} for a folder
            without, that of a model of the user's own.
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
        """The :class:`~fairseq_smoe.benchmark.Benchmark`, or None."""
        return benchmarks.load(self.facts["benchmark"]) if self.facts else None

    @property
    def row(self):
        """The :class:`~fairseq_smoe.benchmark.Row`, or None."""
        return self.benchmark.row(self.facts["row"]) if self.facts else None


def add_row_arguments(parser, optional=False):
    """BENCHMARK ROW and what chooses among its trainings.

    Args:
        optional: whether they may be left out, for a run folder that is named otherwise.
    """
    nargs = "?" if optional else None
    parser.add_argument(
        "benchmark", nargs=nargs, help=f"{', '.join(benchmarks.NAMES)}, or a .json file like theirs"
    )
    parser.add_argument(
        "row", nargs=nargs, help='as in the table, or like "vanilla-moe"; a wrong one lists all'
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="paper",
        help="the paper's sizes, or smaller ones (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="of fairseq (default: %(default)s)"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder of all trainings; this one is in BENCHMARK-SCALE/ROW-seedSEED there "
        "(default: %(default)s)",
    )


def run_folder(runs, benchmark, row, scale, seed):
    """Where the training of a row lies: ``runs/m4-small/vanilla-moe-seed42``."""
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
        raise OptionError(
            f"{folder}: no such run; train it first: bash scripts/train.sh {args.benchmark} "
            f"{row.slug} --scale {args.scale} --seed {args.seed} --runs {args.runs}"
        )
    return read_run(folder)
