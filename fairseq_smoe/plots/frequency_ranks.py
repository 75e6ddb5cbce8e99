"""Training-frequency ranks of the token types of highest and lowest requested capacity (paper,
Figure 3)."""

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from fairseq_smoe.plots.style import bare, label_directions, plt, save, width_of

ENDS = {"highest": "#d55e00", "lowest": "#0072b2"}
GAP = 0.2


def plot_ranks(rows, bands, title, path):
    """Two violins per direction, with all ranks as dots in them; one panel per block and band.

    Args:
        rows: of the table ``types``, of one side.
        bands: of :func:`~fairseq_smoe.plots.style.arrange`.
    """
    ranks = {}
    for row in rows:
        key = row["block"], row["direction"], row["end"]
        ranks.setdefault(key, []).append(row["train_rank"])
    blocks = sorted({block for block, _, _ in ranks})
    figure, all_axes = plt.subplots(
        len(blocks) * len(bands),
        1,
        squeeze=False,
        sharey=True,
        layout="constrained",
        figsize=(width_of(bands, 6, 0.42), 1 + 2.6 * len(blocks) * len(bands)),
    )
    panels = [(block, band) for band in bands for block in blocks]
    for axes, (block, band) in zip(all_axes[:, 0], panels):
        for shift, (end, colour) in zip((-GAP, GAP), ENDS.items()):
            for i, direction in enumerate(band.directions):
                _draw_violin(axes, i + shift, ranks.get((block, direction, end), []), colour)
        axes.yaxis.set_major_locator(MultipleLocator(1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{10**y:,.0f}"))
        label_directions(axes, band)
        axes.set_ylabel(f"block {block}, {band.title}\nfrequency rank".replace(", \n", "\n"))
        bare(axes)
    handles = [Patch(color=colour, alpha=0.6, label=end) for end, colour in ENDS.items()]
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(
        handles=handles,
        title="requested capacity of the types",
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    save(figure, path)


def _draw_violin(axes, place, ranks, colour):
    if not ranks:
        return
    ranks = np.log10(ranks)  # of the density as well: ranks span four orders of magnitude
    if len(set(ranks)) > 1:  # a single value has no density
        parts = axes.violinplot(ranks, [place], widths=0.36, showextrema=False, showmedians=True)
        parts["bodies"][0].set(facecolor=colour, alpha=0.45)
        parts["cmedians"].set(color=colour, linewidth=2)
    axes.plot([place] * len(ranks), ranks, ".", color=colour, markersize=2.5)
