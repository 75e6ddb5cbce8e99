"""Shares as colours: experts against languages, strata against directions."""

import numpy as np
from matplotlib.ticker import PercentFormatter

from fairseq_smoe.plots.style import plt, save

ROOM_FOR_NUMBERS = 16  # columns


def plot_heat_map(panels, columns, title, path, unit, lines=(), highest=None):
    """Draw matrices below each other.

    Args:
        panels: ``[(name, row names, (rows, columns) array)]``; NaN stays white.
        columns: names, left to right.
        title: above all.
        unit: what the colours mean.
        lines: draw a line after these rows, counted from 0, in every panel.
        highest: value of the darkest colour; by default the highest value.
    """
    heights = [len(values) for _, _, values in panels]
    figure, all_axes = plt.subplots(
        len(panels),
        1,
        squeeze=False,
        sharex=True,
        layout="constrained",
        height_ratios=heights,
        figsize=(
            max(6, 2.6 + (0.55 if len(columns) <= ROOM_FOR_NUMBERS else 0.27) * len(columns)),
            1.6 + sum(0.27 * height + 0.3 for height in heights),
        ),
    )
    highest = highest or max(np.nanmax(values) for _, _, values in panels)
    for axes, (name, rows, values) in zip(all_axes[:, 0], panels):
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=highest, aspect="auto")
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.set_ylabel(name)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row in lines:
            axes.axhline(row + 0.5, color="white", linewidth=2)
        if len(columns) <= ROOM_FOR_NUMBERS:
            _write_numbers(axes, values, highest)
    crowded = len(columns) > 12
    all_axes[-1, 0].set_xticks(range(len(columns)), columns, rotation=90 if crowded else 0)
    figure.suptitle(title, x=0.01, ha="left")
    figure.colorbar(
        image,
        ax=all_axes,
        label=unit,
        shrink=min(1, 8 / sum(heights) + 0.2),
        format=PercentFormatter(1, decimals=0),  # as the numbers in the cells
    )
    save(figure, path)


def _write_numbers(axes, values, highest):
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if value > 0.55 * highest else "white",
            )
