"""Train a row of one of the paper's tables: builds the fairseq-train command, prints and runs it.

Every option that is not listed here is passed to fairseq-train, and overrides the benchmark's. To
resume from the last checkpoint, run the same command.
"""

from pathlib import Path

import fairseq_smoe
from fairseq_smoe.benchmarks.runs import add_row_arguments
from fairseq_smoe.training.benchmark_row import plan_training

PASSES_ON_OPTIONS = True


def add_arguments(parser):
    parser.epilog = "All other options are passed to fairseq-train; give them behind BENCHMARK ROW."
    add_row_arguments(parser)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder that prepare has made (default: data/BENCHMARK, or data/BENCHMARK-SCALE)",
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="instead of the folder in --runs")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="target tokens of an update, padding included, on all processes together (default: "
        "the paper's, 13000 or 65000; the authors' run scripts for M4 and M15 reach up to 131072)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="most tokens that a process takes at a time, as its memory allows; the steps until "
        "an update (--update-freq) follow from it (default: %(default)s)",
    )
    parser.add_argument("--cpu", action="store_true", help="do not use GPUs")
    parser.add_argument(
        "--fp32", action="store_true", help="on a GPU: full precision; the default is --fp16"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command, and do not run it"
    )


def run(args):
    # check the options before fairseq is imported, which takes seconds
    training = plan_training(args)
    fairseq_smoe.register()
    training.start(args.dry_run)
