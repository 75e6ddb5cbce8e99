"""Markdown that is readable in a terminal, too: aligned, and split into parts if too wide."""

from fairseq_smoe.text_table import aligned

WIDTH = 120  # characters
EMPHASIS = {"": "", "best": "**", "second": "*"}  # Markdown cannot underline
MARKS = {"": "", "better": "▲", "worse": "▼"}


def render(layout):
    lines = [f"**{layout.title}**", "", *layout.caption, ""]
    first = len(layout.stub)
    rows = [[_cell(text) for text in row] for row in layout.rows if row]
    for title, headers, columns in _parts(layout, rows):
        if title:
            lines += [f"{title}:", ""]
        cells = [row[:first] + [row[column] for column in columns] for row in rows]
        lines += [*aligned([*layout.stub, *headers], cells, first), ""]
    lines += [f"* {note}" for note in layout.notes]
    lines += [f"* **Warning:** {warning}" for warning in layout.warnings]
    return "\n".join(lines).rstrip() + "\n"


def _parts(layout, rows):
    """``(title, headers, columns)`` of the parts. A section is a part of its own, unless it has no
    title and still fits into the width of the part before."""

    def width(column, header):
        return max(len(header), *(len(row[column]) for row in rows)) + 3

    left = sum(width(i, header) for i, header in enumerate(layout.stub))
    parts, column, taken = [], len(layout.stub), 0
    for section in layout.sections:
        columns = list(range(column, column + len(section.headers)))
        column += len(columns)
        wide = sum(map(width, columns, section.headers))
        if parts and not section.title and taken + wide < WIDTH:
            parts[-1][1].extend(section.headers)
            parts[-1][2].extend(columns)
            taken += wide
        else:
            parts.append((section.title, list(section.headers), columns))
            taken = left + wide
    return parts


def _cell(text):
    sign = EMPHASIS[text.emphasis]
    return f"{sign}{_escape(text.text)}{sign}{MARKS[text.mark]}"


def _escape(text):
    return text.replace("|", "\\|").replace("_", "\\_")
