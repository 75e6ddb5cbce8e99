"""Translations of several models to one table and a picture of their requested capacity.

A run folder holds, for every direction such as en-de, ``translations/en-de.out`` (the output of
fairseq-generate) and ``translations/en-de.json`` (its --requested-capacity-file). The folder's
name is the name of the model.
"""

import json
from dataclasses import asdict
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.plots.capacity_directions import plot_capacity
from fairseq_smoe.scores import read_generation, score

COLUMNS = {"BLEU": "{:.1f}", "chrF": "{:.1f}", "RC enc": "{:.2f}", "RC dec": "{:.2f}"}


def add_arguments(parser):
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a folder with translations/")
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="folder for table.md, scores.json and pictures"
    )


def run(args):
    target = Path(args.to)
    results = {Path(folder).name: score_run(Path(folder)) for folder in args.runs}
    check_same_directions(results)
    target.mkdir(parents=True, exist_ok=True)
    table = format_table(results)
    print(table)
    (target / "table.md").write_text(f"{table}\n", encoding="utf-8")
    (target / "scores.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, directions in results.items():
        if any(result["encoder"] > 1 or result["decoder"] > 1 for result in directions.values()):
            path = target / f"requested-capacity-{name}.png"
            plot_capacity(directions, f"Requested capacity of {name}", path)


def score_run(folder):
    """Score every direction of a run; keep translations and references one sentence a line.

    Returns:
        ``{direction: scores, signatures and requested capacity}``, out of English first.
    """
    outputs = sorted((folder / "translations").glob("*.out"), key=_out_of_english_first)
    if not outputs:
        raise OptionError(f"{folder}: no translations/*.out, the output of fairseq-generate")
    results = {}
    for path in outputs:
        translations, references = read_generation(path)
        for suffix, lines in ((".hyp", translations), (".ref", references)):
            path.with_suffix(suffix).write_text("\n".join(lines) + "\n", encoding="utf-8")
        capacity = read_capacity(path.with_suffix(".json"))
        results[path.stem] = asdict(score(translations, references)) | capacity
    return results


def read_capacity(path):
    """``{"encoder": passes, "decoder": passes}`` of a --requested-capacity-file.

    A side without expert layers, such as those of a dense model, makes one pass.
    """
    if not path.exists():
        raise OptionError(f"{path}: no such file; generate with --requested-capacity-file {path}")
    capacity = json.loads(path.read_text(encoding="utf-8"))
    return {side: capacity[side] or 1.0 for side in ("encoder", "decoder")}


def check_same_directions(results):
    first, *others = results
    for other in others:
        if difference := results[first].keys() ^ results[other].keys():
            raise OptionError(
                f"{first} and {other}: only one of them has translations for "
                f"{','.join(sorted(difference))}; generate them with both models"
            )


def format_table(results):
    """Markdown, aligned to be read as plain text too: a row per direction, the means last."""
    header = ["direction"]
    for name in results:
        first, *others = COLUMNS
        header += [f"{name}: {first}", *others]
    directions = list(next(iter(results.values())))
    rows = {direction: [] for direction in [*directions, "mean"]}
    for run in results.values():
        numbers = {direction: _numbers(run[direction]) for direction in directions}
        numbers["mean"] = [sum(column) / len(column) for column in zip(*numbers.values())]
        for direction, row in rows.items():
            row += [form.format(n) for form, n in zip(COLUMNS.values(), numbers[direction])]
    cells = [header] + [[direction, *row] for direction, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _numbers(result):
    return result["bleu"], result["chrf"], result["encoder"], result["decoder"]


def _out_of_english_first(path):
    return not path.stem.startswith("en-"), path.stem
