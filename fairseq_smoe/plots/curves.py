"""Training curves of several runs in one picture."""

from fairseq_smoe.plots.style import COLOURS, LINES, bare, plt, save
from fairseq_smoe.plots.train_log import QUANTITIES

COLUMNS = ("run", "quantity", "updates", "value")


def curve_rows(runs):
    """Tidy rows of ``{run: {quantity: [(updates, value)]}}``."""
    return [
        (run, quantity, *point)
        for run, quantities in runs.items()
        for quantity, points in quantities.items()
        for point in points
    ]


def plot_curves(runs, path):
    """One panel per quantity that any run has, one line per run.

    Args:
        runs: ``{name: {quantity: [(updates, value)]}}`` of
            :func:`~fairseq_smoe.plots.train_log.curves`.
    """
    quantities = [q for q in QUANTITIES if any(q in found for found in runs.values())]
    wide = min(len(quantities), 3)
    high = -(-len(quantities) // wide)
    figure, all_axes = plt.subplots(
        high, wide, squeeze=False, layout="constrained", figsize=(4.6 * wide, 0.8 + 3.4 * high)
    )
    for axes in all_axes.flat[len(quantities) :]:
        axes.remove()
    handles = {}
    for axes, quantity in zip(all_axes.flat, quantities):
        for i, (name, found) in enumerate(runs.items()):
            if quantity not in found:
                continue
            updates, values = zip(*found[quantity])
            (handles[name],) = axes.plot(
                updates,
                values,
                color=COLOURS[i % len(COLOURS)],
                linestyle=LINES[i // len(COLOURS) % len(LINES)],
                marker="o" if len(updates) < 30 else "",
                markersize=4,
            )
        axes.set_title(QUANTITIES[quantity][2], loc="left", fontsize=11)
        axes.set_xlabel("updates")
        bare(axes)
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(len(handles), 4),
        frameon=False,
    )
    save(figure, path)
