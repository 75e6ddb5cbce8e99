"""How many experts a token visits, per block and stratum, over all directions."""

from fairseq_smoe.analysis.tables import means_per_token
from fairseq_smoe.plots.style import SIDES, bare, plt, save

COLUMNS = ("side", "block", "layer", "stratum", "experts_per_token", "experts_per_visit", "visits")
ROOM_FOR_NUMBERS = 0.07  # of the highest bar


def stratum_means(capacity, strata):
    """Means over all directions.

    Args:
        capacity, strata: rows of these tables.

    Returns:
        rows of :data:`COLUMNS`, encoder first. ``experts_per_token`` are those that a token of the
        block visits in the stratum's pass; they add up to those in the block.
    """
    sums = {}
    for row in strata:
        own = sums.setdefault((row["side"], row["block"], row["stratum"]), [0.0, 0])
        if row["visits"]:  # else the mean is no number
            own[0] += row["experts_per_visit"] * row["visits"]
            own[1] += row["visits"]
    blocks = means_per_token(capacity, "side", "block", "layer")
    rows = []
    for side, block, layer in sorted(blocks, key=lambda key: (list(SIDES).index(key[0]), key[1])):
        _, tokens = blocks[side, block, layer]
        for (*own, stratum), (chosen, visits) in sums.items():
            if own == [side, block]:
                means = chosen / max(tokens, 1), chosen / max(visits, 1)
                rows.append((side, block, layer, stratum, *(round(m, 6) for m in means), visits))
    return rows


def plot_experts_per_token(means, title, path):
    """Draw the rows of :func:`stratum_means` as one bar per block, made of its strata."""
    bars = {}
    for side, block, layer, stratum, experts, *_ in means:
        bars.setdefault((side, block, layer), []).append((stratum, experts))
    highest = max(sum(experts for _, experts in parts) for parts in bars.values())
    figure, axes = plt.subplots(figsize=(max(5.0, 1.5 + 1.1 * len(bars)), 4), layout="constrained")
    for i, ((side, _, _), parts) in enumerate(bars.items()):
        top = 0
        for number, (stratum, experts) in enumerate(parts):
            shade = 1 - 0.7 * number / len(parts)
            axes.bar(i, experts, bottom=top, width=0.7, color=(SIDES[side][0], shade))
            if len(parts) > 1 and experts > ROOM_FOR_NUMBERS * highest:
                text, colour = (
                    f"stratum {stratum}: {experts:.2f}",
                    "white" if shade > 0.7 else "black",
                )
                middle = i, top + experts / 2
                axes.annotate(text, middle, ha="center", va="center", fontsize=7, color=colour)
            top += experts
        axes.annotate(
            f"{top:.2f}", (i, top), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    axes.set_ylim(0, 1.15 * max(highest, 0.1))
    axes.set_xticks(range(len(bars)), [f"{side}\nlayer {layer}" for side, _, layer in bars])
    axes.set_ylabel("mean experts per token")
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
    bare(axes)
    save(figure, path)
