"""A table as text cells in sections of columns, independent of the format."""

from dataclasses import dataclass, field

MISSING = "—"


@dataclass(frozen=True)
class Text:
    """The content of a cell.

    Attributes:
        emphasis: "", "best" or "second".
        mark: "better" or "worse" if significantly so than the baseline, else "".
    """

    text: str
    emphasis: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Section:
    """Neighbouring columns.

    Attributes:
        title: over the columns, may be "".
        headers: of the columns.
    """

    title: str
    headers: list


@dataclass
class Layout:
    """A table.

    Attributes:
        title: one line.
        caption: sentences, one per line.
        stub: headers of the first columns, which name the rows.
        sections: the other columns.
        rows: lists of :class:`Text`, stub first; None separates groups of rows.
        notes: lines under the table.
        warnings: lines under the table about problems of the comparison.
    """

    title: str
    caption: list
    stub: list
    sections: list
    rows: list
    notes: list = field(default_factory=list)
    warnings: list = field(default_factory=list)


def number(value, emphasis="", mark="", spread=None, interval=None, signed=False, digits=2):
    """A :class:`Text` of a score; a missing one is a dash."""
    if value is None:
        return Text(MISSING)
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if spread is not None:
        text += f" ±{spread:.{digits}f}"
    if interval is not None:
        text += f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    return Text(text, emphasis, mark)


def millions(value):
    """``148_700_000 -> "148.7M"``"""
    return f"{value / 1e6:.1f}M"


def mflops(value):
    """``192_400_000 -> "192"``, ``2_600_000 -> "2.6"``"""
    return f"{value / 1e6:.0f}" if value >= 1e8 else f"{value / 1e6:.1f}"
