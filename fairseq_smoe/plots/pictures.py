"""``python -m fairseq_smoe plot``: every picture that a run has the numbers for."""

import sys

from fairseq_smoe.analysis.tables import read_table, write_table
from fairseq_smoe.plots.capacity_directions import plot_capacity, side_means
from fairseq_smoe.plots.capacity_layers import layer_means, plot_layers
from fairseq_smoe.plots.curves import COLUMNS, curve_rows, plot_curves
from fairseq_smoe.plots.experts import language_shares, plot_experts, plot_strata
from fairseq_smoe.plots.experts_per_token import COLUMNS as STRATUM_COLUMNS
from fairseq_smoe.plots.experts_per_token import plot_experts_per_token, stratum_means
from fairseq_smoe.plots.frequency_ranks import plot_ranks
from fairseq_smoe.plots.style import SIDES, arrange
from fairseq_smoe.plots.train_log import curves


def analysed_subsets(run):
    """Names of the data sets that `analyse` has counted."""
    return sorted(path.parent.name for path in run.folder.glob("analysis/*/capacity.csv"))


def draw_run(run, subset, target):
    """All pictures of a run's analysis.

    Args:
        run: a :class:`~fairseq_smoe.benchmarks.runs.Run`.
        subset: the analysed data set.
        target: folder to write to.

    Returns:
        paths of the pictures written.
    """
    source = run.folder / "analysis" / subset
    name = run.row.name if run.row else run.name
    heading = f"{name}, {subset}"
    written = []
    if (source / "capacity.csv").exists():
        rows = read_table(source / "capacity.csv")
        if rows:
            target.mkdir(parents=True, exist_ok=True)
            written += _draw_capacity(run, rows, heading, target)
            strata = read_table(source / "strata.csv") if (source / "strata.csv").exists() else []
            if missing := why_no_experts_per_token(rows, strata):
                print(f"{source}: no picture of experts per token, {missing}", file=sys.stderr)
            else:
                written += _draw_experts_per_token(run, rows, strata, heading, target)
    drawers = {
        "types": _draw_directions(plot_ranks, "frequency-ranks", "how frequent are the types"),
        "experts": _draw_experts,
        "strata": _draw_directions(plot_strata, "strata", "how far tokens go"),
    }
    for table, draw in drawers.items():
        path = source / f"{table}.csv"
        rows = read_table(path) if path.exists() else []
        for side in SIDES:
            own = [row for row in rows if row["side"] == side]
            # with one stratum all types make one pass, so there is no highest
            all_equal = table == "types" and len({row["requested_capacity"] for row in own}) == 1
            if own and not all_equal:
                target.mkdir(parents=True, exist_ok=True)
                written.append(draw(run, own, side, heading, target))
    return written


def draw_curves(runs, target):
    """The training curves of all runs, if any has a log with records.

    Args:
        runs: ``{name: Run}``
    """
    found = {}
    for name, run in runs.items():
        log = run.folder / "train.log"
        if log.exists() and (quantities := curves(log)):
            found[name] = quantities
    if not found:
        return []
    target.mkdir(parents=True, exist_ok=True)
    write_table(target / "curves.csv", COLUMNS, curve_rows(found))
    plot_curves(found, target / "curves.png")
    return [target / "curves.png"]


def _draw_capacity(run, rows, heading, target):
    means = side_means(rows)
    path = target / "capacity-directions.png"
    bands = arrange(means, run.benchmark)
    plot_capacity(means, f"Requested capacity of {heading}", path, bands)
    _write_directions(path, means, bands)
    layers = target / "capacity-layers.png"
    plot_layers(layer_means(rows), f"Requested capacity of {heading}, per layer", layers)
    write_table(
        layers.with_suffix(".csv"),
        ("side", "block", "layer", "requested_capacity", "tokens"),
        layer_means(rows),
    )
    return [path, layers]


def why_no_experts_per_token(capacity, strata):
    """Why these tables make no picture of how many experts a token visits; None if they do."""
    if not strata:
        return "because strata.csv is missing; analyse again"
    if "experts_per_token" not in capacity[0] or "experts_per_visit" not in strata[0]:
        return "because an earlier version has counted; analyse again"
    numbers = {row["experts_per_token"] for row in capacity if row["tokens"]}
    if len(numbers) < 2:
        return f"because it is {min(numbers, default=0):g} in all directions and layers"
    return None


def _draw_experts_per_token(run, capacity, strata, heading, target):
    means = side_means(capacity, "experts_per_token")
    path = target / "experts-per-token-directions.png"
    bands = arrange(means, run.benchmark)
    plot_capacity(means, f"Experts per token of {heading}", path, bands, "experts", least=0)
    _write_directions(path, means, bands)
    layers = target / "experts-per-token-layers.png"
    rows = stratum_means(capacity, strata)
    plot_experts_per_token(rows, f"Experts per token of {heading}, per layer", layers)
    write_table(layers.with_suffix(".csv"), STRATUM_COLUMNS, rows)
    return [path, layers]


def _write_directions(path, means, bands):
    ordered = [direction for band in bands for direction in band.directions]
    write_table(
        path.with_suffix(".csv"),
        ("direction", "encoder", "decoder"),
        [(d, *(_rounded(means[d].get(side)) for side in SIDES)) for d in ordered],
    )


def _draw_directions(plot, name, question):
    """A function that draws a picture whose rows are those of the table, direction by direction."""

    def draw(run, rows, side, heading, target):
        path = target / f"{name}-{side}.png"
        bands = arrange(dict.fromkeys(row["direction"] for row in rows), run.benchmark)
        plot(rows, bands, f"{heading}, {side}: {question}", path)
        write_table(path.with_suffix(".csv"), list(rows[0]), [list(row.values()) for row in rows])
        return path

    return draw


def _draw_experts(run, rows, side, heading, target):
    path = target / f"experts-{side}.png"
    shares = language_shares(rows, side)
    which = {"encoder": "source", "decoder": "target"}[side]
    plot_experts(shares, f"{heading}, {side}: experts per {which} language", path, run.benchmark)
    write_table(
        path.with_suffix(".csv"),
        ("language", "block", "expert", "stratum", "first_choices", "share"),
        shares,
    )
    return path


def _rounded(value):
    return "" if value is None else round(value, 6)
