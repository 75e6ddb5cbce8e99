"""Pictures of what a run has: requested capacity per direction, layer and token type, experts per
language, strata, and training curves of all runs together.

Reads RUN/analysis/SUBSET/*.csv, which `analyse` writes, and RUN/train.log. Every picture has the
CSV file that it shows beside it.
"""

import importlib.util
import os
import sys
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.runs import comma_separated, read_run


def add_arguments(parser):
    parser.description = __doc__
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--subset",
        type=comma_separated,
        metavar="NAME,...",
        help="of the analysis (default: all that the run has)",
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
    from fairseq_smoe.plots.pictures import analysed_subsets, draw_curves, draw_run

    runs = {}
    for folder in args.runs:
        found = read_run(folder.absolute())
        if runs.setdefault(_unique_name(found.folder, args.runs), found).folder != found.folder:
            raise OptionError(f"{folder}: another run has the same name; rename one of the folders")
    several = len(runs) > 1
    common = Path(os.path.commonpath([found.folder for found in runs.values()]))
    target = args.to or common / "plots"
    written = draw_curves(runs, target)
    subset_option = f" --subset {','.join(args.subset)}" if args.subset else ""
    for name, found in runs.items():
        own = target / name if several else target
        subsets = args.subset or analysed_subsets(found)
        drawn = [path for subset in subsets for path in draw_run(found, subset, own / subset)]
        written += drawn
        if not drawn:
            print(
                f"{found.folder}: no such analysis to draw; python -m fairseq_smoe analyse "
                f"--run {found.folder}{subset_option}",
                file=sys.stderr,
            )
    if not written:
        raise OptionError(
            f"{', '.join(map(str, args.runs))}: nothing to draw, neither in analysis/ nor a "
            "train.log with JSON records; run: python -m fairseq_smoe analyse "
            f"--run {args.runs[0]}{subset_option}"
        )
    for path in written:
        print(path)


def _unique_name(folder, folders):
    """The folder's name, with its parent's where runs of several benchmarks are drawn."""
    same = {f.absolute() for f in folders if f.absolute().name == folder.name}
    return folder.name if len(same) == 1 else f"{folder.parent.name}-{folder.name}"
