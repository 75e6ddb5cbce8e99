"""Tables of results: as CSV files, and as Markdown."""

import csv
import io

from fairseq_smoe.files import write_whole


def read_csv(path):
    """The lines of a file as dicts; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, columns, lines):
    """Write a file that is either complete or absent.

    Args:
        lines: dicts with all columns.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_whole(path, text.getvalue())


def markdown(columns, lines):
    """A table whose first column is text and whose others are numbers.

    Args:
        lines: lists of cells, which are text.
    """
    rows = [columns, ["---", *["---:"] * (len(columns) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
