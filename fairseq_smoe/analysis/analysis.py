"""``python -m fairseq_smoe analyse``: all directions of a data set, one after the other."""

import hashlib
import json
import sys
from pathlib import Path

from fairseq.data.multilingual.multilingual_utils import get_lang_tok
from tqdm import tqdm

from fairseq_smoe.analysis.collector import RoutingCollector
from fairseq_smoe.analysis.frequency import TrainingFrequencies
from fairseq_smoe.analysis.passes import (
    batches,
    direction_datasets,
    load_model,
    run_pass,
    seed_of,
)
from fairseq_smoe.analysis.tables import COLUMNS, routing_rows, type_rows, write_table
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.saved_model import identify
from fairseq_smoe.files import write_whole
from fairseq_smoe.translation.data_manager import find_shards


def analyse(
    run,
    checkpoint,
    data=None,
    subset="valid",
    directions=None,
    max_sentences=0,
    max_tokens=4096,
    num_types=25,
    min_count=5,
):
    """Write ``capacity.csv``, ``experts.csv``, ``strata.csv`` and ``types.csv`` of a model.

    The counts of every direction are kept in ``parts/``, and reused for the same checkpoint, data
    and settings.

    Args:
        run: the :class:`~fairseq_smoe.benchmarks.runs.Run`.
        checkpoint, data, subset, max_tokens: see ``analyse --help``.
        directions: list, or None for all.
        max_sentences: per direction, 0 for all.
        num_types: types of highest and of lowest requested capacity in ``types.csv``, each.
        min_count: occurrences that a type needs to be in ``types.csv``.

    Raises:
        OptionError: a direction or data set does not exist, or the model is dense.
    """
    model, task, updates = load_model(checkpoint, data)
    dictionary = task.source_dictionary
    collector = RoutingCollector(model, len(dictionary))
    if not collector.blocks:
        print(f"{checkpoint}: a dense model without experts; there is nothing to analyse")
        return
    datasets = direction_datasets(task, subset)
    chosen = _choose(directions, datasets, subset)
    folder = run.folder / "analysis" / subset
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    made_from = {
        "checkpoint": {**identify(checkpoint), "num_updates": updates},
        "data": str(Path(task.args.data).resolve()),
        "files": _fingerprint(task.args.data, subset),
        "max_sentences": max_sentences,
        "types": num_types,
        "min_count": min_count,
        "columns": {name: list(columns) for name, columns in COLUMNS.items()},
    }
    frequencies = TrainingFrequencies(
        task.args.data, run.folder / "analysis" / "training-frequency", dictionary
    )
    leave_out = no_text(dictionary, task.data_manager)
    remaining = [d for d in chosen if _read_part(parts / f"{d}.json", made_from) is None]
    plans = {
        d: batches(datasets[d], task.max_positions(), max_tokens, max_sentences, seed_of(d))
        for d in remaining
    }
    total = sum(len(batch) for plan in plans.values() for batch in plan)
    with collector, tqdm(total=total, unit="sentence", disable=not total) as progress:
        for direction, plan in plans.items():
            progress.set_description(direction)
            run_pass(model, datasets[direction], plan, progress)
            blocks = collector.take()
            tables = routing_rows(direction, blocks)
            tables["types"] = type_rows(
                direction, blocks, dictionary, frequencies, leave_out, num_types, min_count
            )
            part = {"made_from": made_from, "tables": tables}
            write_whole(parts / f"{direction}.json", json.dumps(part))
    write_tables(folder, parts, datasets, made_from)


def write_tables(folder, parts, directions, made_from):
    """Join the tables of all directions that are done, and print how many are left."""
    found = {d: _read_part(parts / f"{d}.json", made_from) for d in directions}
    found = {d: tables for d, tables in found.items() if tables is not None}
    for name, columns in COLUMNS.items():
        rows = [row for tables in found.values() for row in tables[name]]
        write_table(folder / f"{name}.csv", columns, rows)
    left = len(directions) - len(found)
    print(f"{folder}: capacity.csv, experts.csv, strata.csv, types.csv of {len(found)} directions")
    if left:
        print(f"{left} directions are still to do: the same command without --directions")


def _fingerprint(data, subset):
    """A hash of the names, sizes and times of all files that the tables are made from: those of the
    subset, and the training text, whose frequencies are among the types."""
    digest = hashlib.sha256()
    for folder in find_shards(str(data)):
        for path in sorted(Path(folder).glob("*.bin")):
            split = path.name.split(".")[0]
            if split == subset or split.startswith("train"):
                status = path.stat()
                digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def no_text(dictionary, data_manager):
    """Vocabulary ids that are not text: fairseq's four special symbols and the language tokens."""
    style = data_manager.args.lang_tok_style
    tokens = {get_lang_tok(lang, style) for lang in data_manager.langs}
    ids = {dictionary.index(token) for token in tokens if token in dictionary}
    return sorted({*range(dictionary.nspecial), *ids})


def _choose(directions, datasets, subset):
    if directions is None:
        return list(datasets)
    for direction in directions:
        if direction not in datasets:
            raise OptionError(
                f"--directions {direction}: no {subset} sentences of it; choose among "
                + ", ".join(datasets)
            )
    return directions


def _read_part(path, made_from):
    """Tables of a direction that is done, or None."""
    if not path.exists():
        return None
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        print(f"{path}: is no JSON; this direction is done again", file=sys.stderr)
        return None
    return part["tables"] if part["made_from"] == made_from else None
