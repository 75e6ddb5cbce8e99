"""Compute what ranks send and hold when they share experts."""

from fairseq_smoe.accounting.scaling_table import scaling_table
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.errors import OptionError


def add_arguments(parser):
    parser.epilog = "docs/scaling.md explains the figures."
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="m15",
        help=f"{', '.join(benchmarks.NAMES)}, or a .json file of your own (default: %(default)s)",
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="such as smoe-4-12 (default: all of the benchmark)"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 32, 256],
        metavar="W",
        help="processes that train together, one per GPU (default: 8 32 256)",
    )
    parser.add_argument(
        "--expert-parallel-size",
        type=int,
        metavar="N",
        help="as --moe-expert-parallel-size of fairseq-train: ranks that share the experts "
        "(default: the greatest number that divides the ranks and every stratum)",
    )
    parser.add_argument(
        "--tokens-per-rank",
        type=int,
        default=4096,
        metavar="N",
        help="source tokens, and target tokens, of a rank per step (default: %(default)s)",
    )
    parser.add_argument(
        "--update-freq", type=int, default=1, metavar="N", help="steps per update (default: 1)"
    )
    parser.add_argument(
        "--bytes",
        type=int,
        choices=(2, 4),
        default=2,
        help="bytes of an activation or gradient: 2 with --fp16 or --bf16, else 4 (default: "
        "%(default)s)",
    )
    parser.add_argument("--checkpoint-activations", action="store_true", help="as in fairseq-train")


def run(args):
    for flag, values in (
        ("--ranks", args.ranks),
        ("--tokens-per-rank", [args.tokens_per_rank]),
        ("--update-freq", [args.update_freq]),
    ):
        for value in values:
            if value < 1:
                raise OptionError(f"{flag} {value}: expected 1 or more")
    print(scaling_table(args))
