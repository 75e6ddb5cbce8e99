"""The whole way of a benchmark, from text to table and pictures, by the commands of its users."""

import csv
import json
import time

import pytest
import toy_task

LONGEST = 100  # tokens of a sentence
ROWS = {"smoe-2-2-2-2": "SMoE-2-2-2-2", "vanilla-moe": "Vanilla MoE"}  # and their names


@pytest.mark.long
@pytest.mark.parametrize(
    "number, seconds", [(1, 400), pytest.param(2, 480, marks=pytest.mark.slow)]
)
def test_from_text_to_table_and_pictures(number, seconds, tmp_path):
    rows = dict(list(ROWS.items())[:number])
    started = time.monotonic()
    reproduce(tmp_path, rows)
    assert time.monotonic() - started < seconds  # a fraction of it on idle cores
    check_scores(tmp_path, rows)
    check_table(tmp_path, rows)
    check_pictures(tmp_path, rows)


def reproduce(folder, rows):
    """From text to pictures."""
    toy_task.write_corpus(folder / "text")
    toy = folder / "toy.json"
    toy.write_text(json.dumps(toy_task.BENCHMARK))
    toy_task.run(
        *("python", "-m", "fairseq_smoe", "prepare", "--benchmark", toy, "--scale", "tiny"),
        *("--from", folder / "text", "--to", folder / "data"),
        *("--duplicates", "keep", "--held-out", "keep"),
    )
    options = f"--cpu --max-source-positions {LONGEST} --max-target-positions {LONGEST}"
    settings = f"RUNS={folder / 'runs'}", f"TRAIN={options}", "EVALUATE=--cpu"
    settings += "METRICS=bleu", "ANALYSE=valid"
    words = toy, "tiny", 400, folder / "data", folder / "out", *rows
    toy_task.run("env", *settings, "bash", "scripts/reproduce.sh", *words)


def scores_of(folder, row):
    """``{direction: {metric: score}}``"""
    run = folder / "runs" / "toy-tiny" / f"{row}-seed42"
    return json.loads((run / "evaluation/test/scores.json").read_text())["directions"]


def check_scores(project, rows):
    """The models have learned, and every sentence was scored."""
    for row in rows:
        scores = scores_of(project, row)
        assert sorted(scores) == ["aa-en", "bb-en", "en-aa", "en-bb"]
        for score in scores.values():
            assert score["sentences"] == 60
            assert score["bleu"] > 30


def check_table(project, rows):
    """It holds the scores, in three formats."""
    folder = project / "out/test-bleu"
    assert {path.suffix for path in folder.iterdir()} == {".md", ".tex", ".csv"}
    (path,) = folder.glob("*.csv")
    with open(path, newline="", encoding="utf-8") as handle:
        cells = {(cell["row"], cell["column"]): cell for cell in csv.DictReader(handle)}
    for row, name in rows.items():
        bleu = {direction: score["bleu"] for direction, score in scores_of(project, row).items()}
        for direction, score in bleu.items():
            assert float(cells[name, direction]["ours"]) == pytest.approx(score, abs=0.006)
        mean = sum(bleu.values()) / len(bleu)
        assert float(cells[name, "avg"]["ours"]) == pytest.approx(mean, abs=0.006)
    (markdown,) = folder.glob("*.md")
    text = markdown.read_text(encoding="utf-8")
    assert "tiny" in text  # the scale is stated
    cleaning = "default with --held-out keep --duplicates keep"
    assert f"Cleaning of the training text: {cleaning} (" in text
    assert {cell["cleaning"] for cell in cells.values() if cell["ours"]} == {cleaning}
    assert "MoE+EOM" in text  # rows not run are shown


def check_pictures(project, rows):
    """Each has its numbers beside it."""
    folder = project / "out/pictures"
    pictures = {path.with_suffix("") for path in folder.rglob("*.png")}
    assert pictures == {path.with_suffix("") for path in folder.rglob("*.csv")}
    for row in rows:
        own = folder / f"{row}-seed42" if len(rows) > 1 else folder
        assert len(list((own / "valid").glob("*.png"))) >= 6
