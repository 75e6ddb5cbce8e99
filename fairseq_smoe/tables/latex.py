r"""LaTeX with booktabs, as a single table that ``\resizebox`` (graphicx) fits to the page."""

from fairseq_smoe.tables.layout import MISSING

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "▲": r"$^{\uparrow}$",
    "▼": r"$^{\downarrow}$",
    MISSING: "--",
    "`": "",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_EMPHASIS = {"": "{}", "best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"}
_MARKS = {"": "", "better": _SPECIAL["▲"], "worse": _SPECIAL["▼"]}


def escape(text):
    r"""``"a_b & 5%" -> "a\_b \& 5\%"``"""
    return "".join(_SPECIAL.get(character, character) for character in text)


def render(layout):
    columns = "l" * len(layout.stub) + "r" * sum(len(s.headers) for s in layout.sections)
    under = [*layout.notes, *(f"Warning: {warning}" for warning in layout.warnings)]
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}",
        r"\centering",
        r"\caption{" + escape(" ".join([f"{layout.title}.", *layout.caption])) + "}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *_titles(layout),
        _line(
            [escape(h) for h in layout.stub]
            + [escape(h) for section in layout.sections for h in section.headers]
        ),
        r"\midrule",
    ]
    for row in layout.rows:
        lines.append(r"\addlinespace" if row is None else _line(map(_cell, row)))
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize\raggedright {escape(note)}" for note in under]
    return "\n".join([*lines, r"\end{table*}", ""])


def _titles(layout):
    """The sections' titles over their columns, underlined."""
    if not any(section.title for section in layout.sections):
        return []
    cells, rules, column = [""] * len(layout.stub), [], len(layout.stub) + 1
    for section in layout.sections:
        width = len(section.headers)
        title = escape(section.title)
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{title}}}")
        if title:
            rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    return [_line(cells), " ".join(rules)]


def _cell(text):
    return _EMPHASIS[text.emphasis].format(escape(text.text)) + _MARKS[text.mark]


def _line(cells):
    return " & ".join(cells) + r" \\"
