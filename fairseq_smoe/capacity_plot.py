"""Mean requested capacity per direction, encoder and decoder apart, as in the paper's Figure 2."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

SIDES = {"encoder": ("#1b6ca8", "o"), "decoder": ("#d9622b", "D")}  # colour and marker
GAP = 0.15  # between the two sides of a direction, in units of the distance of directions


def plot_capacity(capacities, title, path):
    """Draw requested capacity as stems that start at one pass, the least a token can take.

    Args:
        capacities: ``{direction: {"encoder": passes, "decoder": passes}}`` in the order to show.
        title: above the plot.
        path: the picture to write; its ending chooses the format.
    """
    figure, axes = plt.subplots(figsize=(1.5 + 0.95 * len(capacities), 4.2), layout="constrained")
    for shift, (side, (colour, marker)) in zip((-GAP, GAP), SIDES.items()):
        places = [i + shift for i in range(len(capacities))]
        passes = [sides[side] for sides in capacities.values()]
        axes.vlines(places, 1, passes, colors=colour, linewidth=2, alpha=0.45)
        axes.plot(places, passes, marker, color=colour, markersize=8, label=side)
        for place, value in zip(places, passes):
            axes.annotate(
                f"{value:.2f}",
                (place, value),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    highest = max(sides[side] for sides in capacities.values() for side in SIDES)
    axes.set_ylim(1, 1 + 1.18 * max(highest - 1, 0.1))
    axes.set_xlim(-0.6, len(capacities) - 0.4)
    axes.set_xticks(range(len(capacities)), [d.replace("-", " → ") for d in capacities])
    axes.set_ylabel("mean passes per token")
    axes.set_title(title, loc="left", pad=26)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
