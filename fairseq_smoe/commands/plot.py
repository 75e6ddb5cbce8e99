"""Draw requested capacity per direction, layer and token type, experts per token and per language,
strata, and the training curves of all runs together.

Reads RUN/analysis/SUBSET/*.csv, which `analyse` writes, and RUN/train.log. The numbers of every
picture are written beside it as CSV.
"""

import importlib.util
from pathlib import Path

from fairseq_smoe.benchmarks.runs import comma_separated
from fairseq_smoe.errors import OptionError


def add_arguments(parser):
    parser.description = __doc__
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--subset",
        type=comma_separated,
        metavar="NAME,...",
        help="analysed data sets to draw (default: all that the run has)",
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="folder for the pictures (default: RUN/plots; of several runs, plots in the folder "
        "that they have in common)",
    )


def run(args):
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError('plot needs matplotlib: pip install "fairseq-smoe[plot]"')
    from fairseq_smoe.plots.of_runs import draw

    for path in draw(args.runs, args.subset, args.to):
        print(path)
