"""Parameters and FLOPs of every row of a table."""

from fairseq_smoe.accounting.flops import CONTEXT_LENGTH, render
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.errors import OptionError


def add_arguments(parser):
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        help=f"{', '.join(benchmarks.NAMES)}, or a .json file of your own (default: all of the "
        "former)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=CONTEXT_LENGTH,
        metavar="N",
        help="tokens that a token attends to (default: %(default)s, at which the dense models "
        "agree with the paper)",
    )


def run(args):
    if args.context < 1:
        raise OptionError(f"--context {args.context}: expected 1 or more")
    names = benchmarks.NAMES if args.benchmark == "all" else [args.benchmark]
    for name in names:
        print(render(benchmarks.load(name), args.context), end="\n\n")
