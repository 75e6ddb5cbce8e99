"""Mean requested capacity per block, over all directions (paper, Figure 4)."""

from fairseq_smoe.analysis.tables import means_per_token
from fairseq_smoe.plots.style import SIDES, bare, plt, save


def layer_means(rows):
    """Means over all tokens of all directions.

    Args:
        rows: of the table ``capacity``.

    Returns:
        rows ``(side, block, layer, requested capacity, tokens)``, encoder first.
    """
    means = means_per_token(rows, "side", "block", "layer")
    order = sorted(means, key=lambda key: (list(SIDES).index(key[0]), key[1]))
    return [(*key, round(means[key][0], 6), means[key][1]) for key in order]


def plot_layers(means, title, path):
    """Draw the rows of :func:`layer_means` as one bar per block."""
    figure, axes = plt.subplots(figsize=(max(5.0, 1.5 + 0.8 * len(means)), 4), layout="constrained")
    highest = max(row[3] for row in means)
    for i, (side, _, _, passes, _) in enumerate(means):
        axes.bar(i, passes - 1, bottom=1, width=0.6, color=SIDES[side][0])
        axes.annotate(
            f"{passes:.2f}", (i, passes), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    axes.set_ylim(1, 1 + 1.15 * max(highest - 1, 0.1))
    axes.set_xticks(range(len(means)), [f"{row[0]}\nlayer {row[2]}" for row in means])
    axes.set_ylabel("mean passes per token")
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    bare(axes)
    save(figure, path)
