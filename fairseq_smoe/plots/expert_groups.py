"""How alike the experts of each block are, and which of them are in a group."""

import numpy as np
from matplotlib.patches import Rectangle

from fairseq_smoe.plots.style import plt, save

PER_ROW = 3
ROOM_FOR_NUMBERS = 16  # experts


def plot_groups(panels, title, path, unit):
    """Draw one matrix for each block, with the experts of a group side by side and a frame around
    them.

    Args:
        panels: ``[(name of the block, strata, groups)]``; each stratum is ``(experts, matrix of
            their similarities)``. Experts are numbered from 0, and from 1 in the picture.
        title: above all.
        unit: what the colours mean.
    """
    columns = min(PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    most = max(sum(len(experts) for experts, _ in strata) for _, strata, _ in panels)
    side = 1.2 + 0.3 * min(max(most, 6), 24)
    figure, all_axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(columns * side + 1.2, rows * side + 0.6),
    )
    found = np.concatenate([_pairs(matrix) for _, strata, _ in panels for _, matrix in strata])
    lowest, highest = (found.min(), found.max()) if len(found) else (0, 1)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, strata, groups) in zip(all_axes.flat, panels):
        image = _draw(axes, strata, groups, lowest, highest, most <= ROOM_FOR_NUMBERS)
        axes.set_title(name, fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    figure.colorbar(image, ax=all_axes, label=unit, shrink=0.8)
    save(figure, path)


def _pairs(matrix):
    return matrix[np.triu_indices(len(matrix), k=1)]


def _draw(axes, strata, groups, lowest, highest, with_numbers):
    place = {}
    for e in (e for members in groups for e in members):
        if any(e in experts for experts, _ in strata):  # not for experts that are not alive
            place[e] = len(place)
    values = np.full((len(place), len(place)), np.nan)
    for experts, matrix in strata:
        order = [place[e] for e in experts]
        values[np.ix_(order, order)] = matrix
    np.fill_diagonal(values, np.nan)  # says nothing
    image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=highest)
    names = [str(e + 1) for e in place]
    axes.set_xticks(range(len(place)), names, fontsize=8)
    axes.set_yticks(range(len(place)), names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for members in groups:
        if len(members) > 1:
            start = place[members[0]] - 0.5
            frame = Rectangle((start, start), len(members), len(members), fill=False, linewidth=2)
            frame.set(edgecolor="#d55e00", clip_on=False, zorder=3)
            axes.add_patch(frame)
    if with_numbers:
        _write_numbers(axes, values, lowest, highest)
    return image


def _write_numbers(axes, values, lowest, highest):
    digits = 2 if np.nanmax(np.abs(values), initial=0) >= 0.1 else None
    for (row, column), value in np.ndenumerate(values):
        if digits and np.isfinite(value):
            light = value > lowest + 0.55 * (highest - lowest)
            axes.text(
                column,
                row,
                f"{value:.{digits}f}".replace("0.", ".", 1),
                ha="center",
                va="center",
                fontsize=6,
                color="black" if light else "white",
            )
