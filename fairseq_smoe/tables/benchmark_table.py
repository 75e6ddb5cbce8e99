"""Our scores of a benchmark beside the paper's."""

from fairseq_smoe.tables import conditions
from fairseq_smoe.tables.cells import Cell, Line, best_two, mean_or_none
from fairseq_smoe.tables.layout import MISSING, Layout, Section, Text, mflops, millions, number
from fairseq_smoe.tables.significance import RESAMPLES, SIGNIFICANT

# under a title such as "Into English", "avg" alone would be read as the mean of that side
_HEADERS = {"verylow": "very low", "avg": "avg of all"}


def collect_lines(benchmark, found, metric, baseline=None, tests=None):
    """The :class:`Line` of every row, in the paper's order, run or not.

    A row with more experts than the others does not compete for best and second best, as in the
    paper, which marks the best of the models with equally many experts; that row has twice the
    parameters.

    Args:
        found: ``{row name: [Evaluation, ...]}``
        baseline: name of the row that ``tests`` compare with, or None.
    """
    return [_line(benchmark, row, found, metric, baseline, tests) for row in benchmark.rows]


def _competes(benchmark, row):
    """Whether a row competes for best; all rows of a user's own benchmark do."""
    return competes(row) or not benchmark.table


def competes(row):
    """Whether a row of the paper may be marked as the best."""
    return not row.name.endswith(" experts")


def _line(benchmark, row, found, metric, baseline, tests):
    evaluations = found.get(row.name, [])
    cells = {}
    for column, directions in benchmark.columns().items():
        seeds = {
            evaluation.seed: mean_or_none(evaluation.score(d, metric) for d in directions)
            for evaluation in evaluations
        }
        seeds = {seed: score for seed, score in seeds.items() if score is not None}
        cell = cells[column] = Cell(seeds, row.scores.get(column))
        if tests and seeds and row.name != baseline and found.get(baseline):
            complete = [
                [e for e in group if all(d in e.directions for d in directions)]
                for group in (evaluations, found[baseline])
            ]
            if all(complete):
                cell.p_value = tests.p_value(*complete, directions)
                cell.against = cell.ours - mean_or_none(
                    mean_or_none(e.score(d, metric) for d in directions) for e in complete[1]
                )
    size = None
    if evaluations and (model := evaluations[0].scores.get("model")):
        size = model["parameters"], model["flops_per_token"]
    printed = row.params, "" if row.mflops is None else str(row.mflops)
    return Line(row.name, cells, size, printed, _competes(benchmark, row), row.name == baseline)


def sections(benchmark):
    """The columns by side of English, then the rest, as the paper orders them."""
    found = []
    for column, directions in benchmark.columns().items():
        sources, targets = ({d.split("-")[i] for d in directions} for i in (0, 1))
        into, out = targets == {benchmark.english}, sources == {benchmark.english}
        title = "Into English" if into else "Out of English" if out else ""
        header = column.partition("_")[2] or column
        if not found or found[-1].title != title:
            found.append(Section(title, []))
        found[-1].headers.append(_HEADERS.get(header, header))
    return found


def lay_out(benchmark, lines, evaluations, scale, subset, metric, baseline, tests):
    """The :class:`Layout`: per row ours, the paper's, and the difference."""
    columns = benchmark.columns()
    ours, paper = (
        {
            column: best_two(
                {line.name: get(line.cells[column]) for line in lines if line.competes}
            )
            for column in columns
        }
        for get in (lambda cell: cell.ours, lambda cell: cell.paper)
    )
    rows = []
    for line in lines:
        if rows:
            rows.append(None)
        rows += _rows_of(line, columns, ours, paper)
    caption = _caption(benchmark, evaluations, scale, subset, metric)
    notes, warnings = _notes(benchmark, lines, evaluations, metric, baseline, tests)
    return Layout(
        f"{benchmark.title}, {metric}, scale {scale}"
        + (f", beside {benchmark.table} of the paper" if benchmark.table else ""),
        caption,
        ["row", ""],
        [*sections(benchmark), Section("", ["#params", "MFLOPs"])],
        rows,
        notes,
        warnings,
    )


def _rows_of(line, columns, ours, paper):
    name = f"{line.name} (baseline)" if line.baseline else line.name
    cells = [(column, line.cells[column]) for column in columns]
    params, flops = (MISSING, MISSING)
    if line.size:
        params, flops = millions(line.size[0]), mflops(line.size[1])
    first = [Text(name), Text("ours")]
    first += [
        number(cell.ours, ours[column].get(line.name, ""), _mark(cell), cell.spread)
        for column, cell in cells
    ]
    first += [Text(params), Text(flops)]
    if not any(cell.paper for _, cell in cells):
        return [first]  # a user's own benchmark
    second = [Text(""), Text("paper")]
    second += [number(cell.paper, paper[column].get(line.name, "")) for column, cell in cells]
    second += [Text(text or MISSING) for text in line.paper_size]
    if all(cell.ours is None for _, cell in cells):
        return [first, second]
    third = [Text(""), Text("difference")]
    third += [number(cell.difference, signed=True) for _, cell in cells]
    return [first, second, [*third, Text(""), Text("")]]


def _mark(cell):
    if cell.p_value is None or cell.p_value >= SIGNIFICANT or not cell.against:
        return ""
    return "better" if cell.against > 0 else "worse"


def _caption(benchmark, evaluations, scale, subset, metric):
    first = evaluations[0]
    settings = conditions.settings_text(first)
    caption = [
        f"Scores on {subset} after {conditions.updates_text(evaluations)} at scale {scale}"
        f"{f' ({settings})' if settings else ''}. Signature: {first.signature(metric)}.",
        conditions.cleaning_text(evaluations, benchmark),
    ]
    if not benchmark.table:
        return caption
    caption.append(
        "Numbers at another scale than the paper's, or with other text, are no reproduction of the "
        "paper's."
    )
    if metric != benchmark.metric:
        caption.append(
            f"The paper's scores are {benchmark.metric}, ours {metric}: do not compare them."
        )
    if benchmark.metric == "piece-bleu":
        caption.append(
            "That the paper's scores are piece-bleu follows from its authors' scripts; whether its "
            "batches had 13K tokens, as it says, or up to 131K, as in the scripts, is not known."
        )
    return caption


def _notes(benchmark, lines, evaluations, metric, baseline, tests):
    tested = any(cell.p_value is not None for line in lines for cell in line.cells.values())
    seeds = sorted({evaluation.seed for evaluation in evaluations})
    notes = [emphasis_note()]
    if benchmark.table:
        notes = [emphasis_note("ours and the paper's apart"), "difference: ours minus the paper's"]
    if any(not line.competes for line in lines):
        notes.append("the row with more experts than the others does not compete for best")
    if tested:
        notes.append(significance_note(baseline, len(seeds) > 1))
    else:
        notes.append(
            f"not tested for significance against {baseline}: {_why(lines, metric, tests)}"
        )
    notes.append(seeds_note(lines, seeds))
    missing = [line.name for line in lines if not any(c.seeds for c in line.cells.values())]
    if missing:
        notes.append(f"{MISSING}: not run ({', '.join(missing)})")
    warnings = conditions.differences(evaluations, metric) + (tests.warnings if tests else [])
    return notes, warnings


def _why(lines, metric, tests):
    """The reason why there are no p-values."""
    if tests and tests.warnings:
        return "see the warning"
    run = [line for line in lines if any(cell.seeds for cell in line.cells.values())]
    if not any(line.baseline for line in run):
        return "it was not run"
    if len(run) == 1:
        return "no other row was run"
    return "there is no test for comet" if metric == "comet" else "--no-tests"


def emphasis_note(among=""):
    among = f", {among}" if among else ""
    return f"bold: best of a column; italics (LaTeX: underlined): second best{among}; ties share"


def significance_note(baseline, several_seeds):
    seeds = "; the draws are of sentences, not of seeds" if several_seeds else ""
    return (
        f"▲ ▼: significantly better or worse than {baseline}: two-sided paired bootstrap over the "
        f"test sentences, {RESAMPLES:,} draws, p < {SIGNIFICANT}, not corrected for the number of "
        f"comparisons{seeds}"
    )


def seeds_note(lines, seeds):
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    if any(cell.spread is not None for line in lines for cell in line.cells.values()):
        return f"{told}; where a row has several, their mean ± standard deviation"
    return told
