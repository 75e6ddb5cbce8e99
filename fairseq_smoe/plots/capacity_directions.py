"""Mean requested capacity, or another mean over tokens, per direction of encoder and decoder
(paper, Figure 2)."""

from pathlib import Path

from fairseq_smoe.analysis.tables import means_per_token
from fairseq_smoe.plots.style import (
    SIDES,
    Band,
    bare,
    label_directions,
    plt,
    save,
    width_of,
)

GAP = 0.15  # between the two sides of a direction, in units of the distance of directions
ROOM_FOR_NUMBERS = 16  # directions side by side


def side_means(rows, of="requested_capacity"):
    """Means over the blocks of each side.

    Args:
        rows: of the table ``capacity``.
        of: the column to take means of.

    Returns:
        ``{direction: {"encoder": mean, "decoder": mean}}``; a side without blocks is left out.
    """
    sides = {}
    for (direction, side), (mean, _) in means_per_token(rows, "direction", "side", of=of).items():
        sides.setdefault(direction, {})[side] = mean
    return sides


def plot_capacity(means, title, path, bands=None, quantity="passes", least=1):
    """Draw requested capacity as stems that start at one pass, the minimum of a token.

    Args:
        means: ``{direction: {"encoder": mean, "decoder": mean}}``
        title: above the plot.
        path: the picture to write; its ending chooses the format.
        bands: of :func:`~fairseq_smoe.plots.style.arrange`; None for all in a row, as given.
        quantity: what is drawn, if not passes.
        least: where the stems start.
    """
    if bands is None:
        names = [direction.replace("-", " → ") for direction in means]
        bands = [Band("", list(means), names, [])]
    crowded = max(len(band.directions) for band in bands) > ROOM_FOR_NUMBERS
    figure, all_axes = plt.subplots(
        len(bands),
        1,
        squeeze=False,
        sharey=True,
        layout="constrained",
        figsize=(width_of(bands, 5.5, 0.34 if crowded else 0.95), 1.2 + 3.2 * len(bands)),
    )
    highest = max(mean for sides in means.values() for mean in sides.values())
    for axes, band in zip(all_axes[:, 0], bands):
        for shift, side in zip((-GAP, GAP), SIDES):
            _draw_side(axes, band, means, side, shift, least, numbers=not crowded)
        axes.set_ylim(least, least + 1.18 * max(highest - least, 0.1))
        label_directions(axes, band)
        axes.set_ylabel(f"{band.title}\nmean {quantity} per token".strip())
        bare(axes)
    first = all_axes[0, 0]
    first.set_title(title, loc="left", pad=30)
    first.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1.04), borderpad=0)
    save(figure, Path(path))


def _draw_side(axes, band, means, side, shift, least, numbers):
    colour, marker = SIDES[side]
    values = [means[direction].get(side) for direction in band.directions]
    points = [(i + shift, value) for i, value in enumerate(values) if value is not None]
    if not points:
        return
    places, values = zip(*points)
    axes.vlines(places, least, values, colors=colour, linewidth=2, alpha=0.45)
    axes.plot(places, values, marker, color=colour, markersize=8 if numbers else 6, label=side)
    for place, value in points if numbers else ():
        axes.annotate(
            f"{value:.2f}",
            (place, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )
