"""Tables of scores: a benchmark's rows beside the paper's, the paper's alone, or any runs."""

from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.evaluation.scoring import METRICS, add_tokenizer_option
from fairseq_smoe.tables.comparison import DEFAULT_BASELINE, FORMATS, tabulate

USAGE = """\
tabulate m4 --scale small      our scores of the rows that were run, beside the paper's
tabulate m4 --paper            the paper's table
tabulate RUN RUN ...           scores of any runs, without the paper's
"""


def add_arguments(parser):
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.description = f"{parser.description}.\n\n{USAGE}"
    parser.add_argument(
        "what",
        nargs="+",
        metavar="BENCHMARK|RUN",
        help=f"{', '.join(benchmarks.NAMES)} or a .json file like theirs, or folders of runs that "
        "are evaluated",
    )
    parser.add_argument("--paper", action="store_true", help="print only the paper's table")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="where train keeps the runs of benchmarks (default: %(default)s)",
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="paper", help="scale of the runs (default: %(default)s)"
    )
    parser.add_argument("--subset", default="test", help="test set (default: %(default)s)")
    parser.add_argument(
        "--metric",
        metavar="METRIC",
        help=f"{', '.join(METRICS)} (default: the metric of the paper's table; bleu for RUN ...)",
    )
    parser.add_argument(
        "--baseline",
        metavar="ROW",
        help="row that the others are tested against; for RUN ... one of them "
        f"(default: {DEFAULT_BASELINE}, or the first row where there is none; for RUN ... none)",
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="no tests of significance, which take a while"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="runs of these seeds only (default: all)"
    )
    add_tokenizer_option(parser)
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help=f"folder for {', '.join(FORMATS.values())}"
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        help="of the files in --to (default: all); Markdown is printed in any case",
    )


def run(args):
    tabulate(args)
