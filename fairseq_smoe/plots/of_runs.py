"""All pictures of some runs: those of each run, and those of all runs together."""

import os
import sys
from pathlib import Path

from fairseq_smoe.benchmarks.runs import read_run
from fairseq_smoe.errors import OptionError
from fairseq_smoe.plots.pictures import analysed_subsets, draw_curves, draw_run


def draw(folders, asked=None, target=None):
    """Draw all pictures that the runs have numbers for.

    Args:
        folders: of the runs.
        asked: subsets of the analysis; None for all that a run has.
        target: folder for the pictures; None for ``plots`` in the runs' common folder.

    Returns:
        Paths of the pictures.

    Raises:
        OptionError: there is nothing to draw, or two runs have the same name.
    """
    runs = {}
    for folder in folders:
        found = read_run(folder.absolute())
        if runs.setdefault(_unique_name(found.folder, folders), found).folder != found.folder:
            raise OptionError(f"{folder}: another run has the same name; rename one of the folders")
    several = len(runs) > 1
    common = Path(os.path.commonpath([found.folder for found in runs.values()]))
    target = target or common / "plots"
    written = draw_curves(runs, target)
    subset_option = f" --subset {','.join(asked)}" if asked else ""
    for name, found in runs.items():
        own = target / name if several else target
        subsets = asked or analysed_subsets(found)
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
            f"{', '.join(map(str, folders))}: nothing to draw, neither in analysis/ nor a "
            "train.log with JSON records; run: python -m fairseq_smoe analyse "
            f"--run {folders[0]}{subset_option}"
        )
    return written


def _unique_name(folder, folders):
    """The folder's name, with its parent's if runs of several benchmarks are drawn."""
    same = {f.absolute() for f in folders if f.absolute().name == folder.name}
    return folder.name if len(same) == 1 else f"{folder.parent.name}-{folder.name}"
