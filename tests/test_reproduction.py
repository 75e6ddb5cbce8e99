"""The whole way of a benchmark, from text to table and pictures, by the commands of its users."""

import csv
import json
import time

import pytest
import toy_task

ROWS = ("vanilla-moe", "smoe-2-2-2-2")

# the toy task as a benchmark: 4 directions, the rows of M4
TOY = {
    "like": "m4",
    "title": "Toy",
    "english": "en",
    "languages": [{"code": "aa", "resource": "high"}, {"code": "bb", "resource": "low"}],
    "splits": {"train": "train", "valid": "valid", "test": "test"},
    "metric": "bleu",
    "vocab_size": 608,
    "batch_tokens": 10400,
}


def command(*words, **options):
    return toy_task.run("python", "-m", "fairseq_smoe", *words, **options)


def test_from_text_to_table_and_pictures(tmp_path):
    started = time.monotonic()
    reproduce(tmp_path)
    assert time.monotonic() - started < 240  # four minutes
    check_scores(tmp_path)
    check_table(tmp_path)
    check_pictures(tmp_path)


def reproduce(folder):
    """Two rows, from text to pictures."""
    toy_task.write_corpus(folder / "text")
    toy = folder / "toy.json"
    toy.write_text(json.dumps(TOY))
    scale, runs = ("--scale", "tiny"), ("--runs", folder / "runs")
    command(
        *("prepare", "--benchmark", toy, *scale, "--from", folder / "text"),
        *("--to", folder / "data", "--duplicates", "keep", "--held-out", "keep"),
    )
    for row in ROWS:
        toy_task.run(
            *("bash", "scripts/train.sh", toy, row, *scale, *runs, "--data", folder / "data"),
            *("--cpu", "--max-update", 400, "--max-source-positions", 100),
            *("--max-target-positions", 100),
        )
        toy_task.run("bash", "scripts/evaluate.sh", toy, row, *scale, *runs, "--cpu")
        command("analyse", toy, row, *scale, *runs)
    command("tabulate", toy, *scale, *runs, "--to", folder / "tables")
    command("plot", *(run_of(folder, row) for row in ROWS), "--to", folder / "pictures")


def run_of(folder, row):
    return folder / "runs" / "toy-tiny" / f"{row}-seed42"


def check_scores(project):
    """The models have learned, and every sentence was scored."""
    for row in ROWS:
        scores = json.loads((run_of(project, row) / "evaluation/test/scores.json").read_text())
        assert sorted(scores["directions"]) == ["aa-en", "bb-en", "en-aa", "en-bb"]
        for direction in scores["directions"].values():
            assert direction["sentences"] == 60
            assert direction["bleu"] > 30


def check_table(project):
    """It holds the scores, in three formats."""
    tables = {path.suffix for path in (project / "tables").iterdir()}
    assert tables == {".md", ".tex", ".csv"}
    (path,) = (project / "tables").glob("*.csv")
    with open(path, newline="", encoding="utf-8") as handle:
        cells = {(cell["row"], cell["column"]): cell for cell in csv.DictReader(handle)}
    for row, name in zip(ROWS, ("Vanilla MoE", "SMoE-2-2-2-2")):
        scores = json.loads((run_of(project, row) / "evaluation/test/scores.json").read_text())
        bleu = {d: score["bleu"] for d, score in scores["directions"].items()}
        for direction, score in bleu.items():
            assert float(cells[name, direction]["ours"]) == pytest.approx(score, abs=0.006)
        mean = sum(bleu.values()) / len(bleu)
        assert float(cells[name, "avg"]["ours"]) == pytest.approx(mean, abs=0.006)
    (markdown,) = (project / "tables").glob("*.md")
    text = markdown.read_text(encoding="utf-8")
    assert "tiny" in text  # the scale is stated
    assert "MoE+EOM" in text  # rows not run are shown


def check_pictures(project):
    """Each has its numbers beside it."""
    pictures = {path.stem for path in (project / "pictures").rglob("*.png")}
    numbers = {path.stem for path in (project / "pictures").rglob("*.csv")}
    assert len(pictures) >= 6 and pictures <= numbers
