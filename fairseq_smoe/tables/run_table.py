"""Scores of runs on any data: a column per direction, means, and requested capacity."""

from fairseq_smoe.errors import OptionError
from fairseq_smoe.tables import conditions
from fairseq_smoe.tables.benchmark_table import emphasis_note, significance_note
from fairseq_smoe.tables.cells import Cell, Line, best_two, mean_or_none
from fairseq_smoe.tables.layout import Layout, Section, Text, mflops, millions, number
from fairseq_smoe.tables.significance import SIGNIFICANT

MEAN, MEAN_OF_ALL = "mean", "mean of all"


def columns_of(evaluations):
    """``{title of section: {column: directions}}`` of all directions that the runs translate.

    If English is on one side of all directions, there is one section per side, with its mean last,
    and the mean over all. Otherwise there is one section.
    """
    directions = sorted({d for evaluation in evaluations for d in evaluation.directions})
    english = hub_language(directions)
    sides = {"Directions": directions}
    if english:
        sides = {
            "Into English": [d for d in directions if d.split("-")[1] == english],
            "Out of English": [d for d in directions if d.split("-")[0] == english],
        }
    sections = {}
    for title, side in sides.items():
        if side:
            sections[title] = {direction: [direction] for direction in side}
            if english and len(side) > 1:
                sections[title][MEAN] = side
    sections[""] = {MEAN_OF_ALL: directions}
    return sections


def hub_language(directions):
    """The code of English if it is on one side of all directions, else None."""
    for language in ("eng", "en", "eng_Latn"):
        if all(language in direction.split("-") for direction in directions):
            return language
    return None


def collect_lines(evaluations, metric, baseline=None, tests=None):
    """The :class:`Line` of every run; its columns are named ``direction`` or ``title: mean``.

    Raises:
        OptionError: no run is named like the baseline.
    """
    names = unique_names(evaluations)
    if baseline is not None and baseline not in names:
        raise OptionError(f"--baseline {baseline}: is none of the runs {', '.join(names)}")
    other = dict(zip(names, evaluations)).get(baseline)
    lines = []
    for name, evaluation in zip(names, evaluations):
        cells = {}
        for title, columns in columns_of(evaluations).items():
            for column, directions in columns.items():
                score = mean_or_none(evaluation.score(d, metric) for d in directions)
                cell = Cell({} if score is None else {evaluation.seed: score})
                theirs = other and mean_or_none(other.score(d, metric) for d in directions)
                if tests and name != baseline and None not in (score, theirs):
                    cell.p_value = tests.p_value([evaluation], [other], directions)
                    cell.against = score - theirs
                if tests and score is not None and len(directions) > 1:
                    cell.interval = tests.interval([evaluation], directions)
                cells[column_name(title, column)] = cell
        model = evaluation.scores.get("model")
        size = (model["parameters"], model["flops_per_token"]) if model else None
        lines.append(Line(name, cells, size, baseline=name == baseline))
    return lines


def column_name(title, column):
    return f"{title}: {column}" if column == MEAN else column


def unique_names(evaluations):
    """The runs' names, or their paths if two runs have the same name."""
    names = [evaluation.name for evaluation in evaluations]
    return [
        name if names.count(name) == 1 else str(evaluation.run)
        for name, evaluation in zip(names, evaluations)
    ]


def lay_out(lines, evaluations, subset, metric, baseline, tests):
    """The :class:`Layout`."""
    sections = columns_of(evaluations)
    keys = [column_name(title, column) for title, columns in sections.items() for column in columns]
    best = {key: best_two({line.name: line.cells[key].ours for line in lines}) for key in keys}
    rows = []
    for line, evaluation in zip(lines, evaluations):
        row = [Text(f"{line.name} (baseline)" if line.baseline else line.name)]
        for key in keys:
            cell = line.cells[key]
            emphasis = best[key].get(line.name, "")
            row.append(number(cell.ours, emphasis, _mark(cell), interval=cell.interval))
        row += [number(evaluation.requested_capacity(side)) for side in ("encoder", "decoder")]
        size = line.size
        row += [Text(millions(size[0])), Text(mflops(size[1]))] if size else [number(None)] * 2
        rows.append(row)
    settings = conditions.settings_text(evaluations[0])
    notes = [emphasis_note()] if len(lines) > 1 else []
    notes.append("RC: requested capacity, mean over the directions")
    if any(cell.p_value is not None for line in lines for cell in line.cells.values()):
        notes.append(significance_note(baseline, several_seeds=False))
    if any(cell.interval is not None for line in lines for cell in line.cells.values()):
        notes.append("beside means: where 95% of the draws of the bootstrap lie")
    warnings = conditions.differences(evaluations, metric) + (tests.warnings if tests else [])
    return Layout(
        f"{metric} on {subset}",
        [
            f"After {conditions.updates_text(evaluations)}{f' ({settings})' if settings else ''}. "
            f"Signature: {evaluations[0].signature(metric)}.",
            conditions.cleaning_text(evaluations),
        ],
        ["run"],
        [
            *(Section(title, list(columns)) for title, columns in sections.items()),
            Section("", ["RC encoder", "RC decoder", "#params", "MFLOPs"]),
        ],
        rows,
        notes,
        warnings,
    )


def _mark(cell):
    if cell.p_value is None or cell.p_value >= SIGNIFICANT or not cell.against:
        return ""
    return "better" if cell.against > 0 else "worse"
