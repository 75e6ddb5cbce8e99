"""The content of ``scores.json`` as a table for the terminal."""

from fairseq_smoe.text_table import aligned

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
    header = ["", *scores["metrics"], *COLUMNS.values()]
    table = [
        [name, *("" if value is None else f"{value:.2f}" for value in values)]
        for name, values in rows.items()
    ]
    return "\n".join(aligned(header, table, left=1))


def _mean(values):
    return None if None in values else sum(values) / len(values)
