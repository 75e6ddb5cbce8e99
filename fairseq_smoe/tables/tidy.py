"""The table as CSV, one score per line."""

import csv
import io

from fairseq_smoe.tables.cells import DIGITS
from fairseq_smoe.tables.significance import SIGNIFICANT

FIELDS = (
    "benchmark scale subset metric cleaning row seed column ours paper difference p_value "
    "significant low high"
).split()


def render(lines, facts):
    """One line per row, column and seed; with several seeds also one line for their mean.

    If there is a line of the mean, it has the p-value. Rows that were not run have the paper's
    scores only.

    Args:
        lines: list of :class:`~fairseq_smoe.tables.cells.Line`.
        facts: benchmark, scale, subset, metric, and cleaning of the training text.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        for column, cell in line.cells.items():
            common = {**facts, "row": line.name, "column": column, "paper": _text(cell.paper)}
            last = {"mean": cell.ours} if len(cell.seeds) != 1 else cell.seeds
            for seed, score in cell.seeds.items() if len(cell.seeds) > 1 else ():
                writer.writerow({**common, "seed": seed, **_ours(score, cell)})
            for seed, score in last.items():
                seed = "" if score is None or seed is None else seed
                row = {**common, "seed": seed, **_ours(score, cell)}
                if cell.p_value is not None:
                    row["p_value"] = f"{cell.p_value:.4f}"
                    row["significant"] = "yes" if cell.p_value < SIGNIFICANT else "no"
                if cell.interval is not None:
                    row["low"], row["high"] = (_text(bound, 4) for bound in cell.interval)
                writer.writerow(row)
    return out.getvalue()


def _ours(score, cell):
    if score is None:
        return {}
    difference = None if cell.paper is None else score - cell.paper
    return {"ours": _text(score, 4), "difference": _text(difference, 4)}


def _text(value, digits=DIGITS):
    return "" if value is None else f"{value:.{digits}f}"
