"""What ``scores.json`` holds, for the terminal."""

COLUMNS = {"encoder": "RC enc", "decoder": "RC dec"}


def score_table(scores):
    """Markdown: a line for each direction, and their mean.

    Args:
        scores: what ``scoring.score_folder`` returns.
    """
    rows = {}
    for direction, facts in scores["directions"].items():
        capacity = facts.get("requested_capacity") or {}
        rows[direction] = [
            *(facts[metric] for metric in scores["metrics"]),
            *(capacity.get(side) for side in COLUMNS),
        ]
    rows["mean"] = [_mean(column) for column in zip(*rows.values())]
    table = [["", *scores["metrics"], *COLUMNS.values()]] + [
        [name, *("" if value is None else f"{value:.2f}" for value in values)]
        for name, values in rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))
        )
        + " |"
        for line in table
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _mean(values):
    return None if None in values else sum(values) / len(values)
