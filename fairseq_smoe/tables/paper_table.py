"""The paper's own table, with means recomputed from the other columns."""

from fairseq_smoe.tables.benchmark_table import (
    competes,
    emphasis_note,
    sections,
)
from fairseq_smoe.tables.cells import Cell, Line, best_two
from fairseq_smoe.tables.layout import MISSING, Layout, Section, Text, number

METRICS = {
    "piece-bleu": "BLEU, most likely over SentencePiece pieces (piece-bleu)",
    "spbleu": "BLEU over the pieces of Flores-200 (spbleu)",
}


def recompute_means(benchmark, scores):
    """Columns that are means over other columns, computed from these.

    A column over several directions is the mean of the finest columns that it covers, weighted by
    how many directions each has.

    Args:
        scores: ``{column: score}`` of one row.

    Returns:
        ``{column: mean}``, only of columns for which it can be computed.
    """
    columns = {column: frozenset(directions) for column, directions in benchmark.columns().items()}
    finest = [c for c, own in columns.items() if not any(o < own for o in columns.values())]
    means = {}
    for column, directions in columns.items():
        parts = [c for c in finest if columns[c] < directions]
        if parts and frozenset().union(*(columns[c] for c in parts)) == directions:
            total = sum(scores[c] * len(columns[c]) for c in parts)
            means[column] = total / len(directions)
    return means


def collect_lines(benchmark):
    """The paper's rows as :class:`Line`, with the scores as printed."""
    return [
        Line(
            row.name,
            {column: Cell(paper=score) for column, score in row.scores.items()},
            paper_size=(row.params, "" if row.mflops is None else str(row.mflops)),
            competes=competes(row),
        )
        for row in benchmark.rows
    ]


def lay_out(benchmark, lines):
    """The :class:`Layout`: recomputed means, and the printed ones in brackets if they differ."""
    columns = benchmark.columns()
    means = {row.name: recompute_means(benchmark, row.scores) for row in benchmark.rows}
    best = {
        column: best_two({line.name: line.cells[column].paper for line in lines if line.competes})
        for column in columns
    }
    sizes = any(any(line.paper_size) for line in lines)
    rows = []
    for line in lines:
        row = [Text(line.name)]
        for column in columns:
            emphasis = best[column].get(line.name, "")
            row.append(_score(line.cells[column].paper, means[line.name].get(column), emphasis))
        rows.append(row + [Text(text or MISSING) for text in line.paper_size if sizes])
    off = max(
        abs(mean - row.scores[column])
        for row in benchmark.rows
        for column, mean in means[row.name].items()
    )
    notes = [
        emphasis_note(),
        f"{', '.join(means[lines[0].name])}: recomputed from the other columns, from which the "
        f"printed ones differ by {off:.3f} at most; in brackets: as printed, where the last digit "
        "is another",
    ]
    if not all(line.competes for line in lines):
        notes.append("the row with more experts than the others does not compete for best")
    return Layout(
        f"{benchmark.table} of the paper: {benchmark.title}",
        [f"As printed in arXiv 2305.02176: {METRICS[benchmark.metric]}."],
        ["row"],
        [*sections(benchmark), *([Section("", ["#params", "MFLOPs"])] if sizes else [])],
        rows,
        notes,
    )


def _score(printed, recomputed, emphasis):
    if recomputed is None:
        return number(printed, emphasis)
    text = number(recomputed, emphasis)
    if text.text == number(printed).text:
        return text
    return Text(f"{text.text} ({number(printed).text})", emphasis)
