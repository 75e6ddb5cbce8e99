"""Parameters and FLOPs of every row of the paper's tables."""

from fairseq_smoe.accounting.flops import render
from fairseq_smoe.benchmarks import benchmark as benchmarks


def add_arguments(parser):
    parser.add_argument("benchmark", choices=[*benchmarks.NAMES, "all"], nargs="?", default="all")


def run(args):
    for name in benchmarks.NAMES:
        if args.benchmark in (name, "all"):
            print(render(benchmarks.load(name)), end="\n\n")
