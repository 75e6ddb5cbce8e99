"""The whole way of a benchmark, from text to table and pictures, by the commands of its users."""

import csv
import json
import time

import pytest
import toy_task

pytestmark = pytest.mark.xdist_group("reproduction")  # one process makes what all look at

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


@pytest.fixture(scope="module")
def project(make_once):
    """A folder with the data, two trained rows, their translations, analysis, table and pictures,
    and the seconds all of it took."""
    return make_once("reproduction", reproduce)


def reproduce(folder):
    started = time.monotonic()
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
    (folder / "seconds").write_text(str(time.monotonic() - started))


def run_of(folder, row):
    return folder / "runs" / "toy-tiny" / f"{row}-seed42"


def test_it_takes_less_than_four_minutes(project):
    assert float((project / "seconds").read_text()) < 240


def test_the_models_have_learned(project):
    for row in ROWS:
        scores = json.loads((run_of(project, row) / "evaluation/test/scores.json").read_text())
        assert sorted(scores["directions"]) == ["aa-en", "bb-en", "en-aa", "en-bb"]
        for direction in scores["directions"].values():
            assert direction["sentences"] == 60
            assert direction["bleu"] > 30


def test_the_table_holds_the_scores(project):
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


def test_the_pictures_are_drawn_each_with_its_numbers(project):
    pictures = {path.stem for path in (project / "pictures").rglob("*.png")}
    numbers = {path.stem for path in (project / "pictures").rglob("*.csv")}
    assert len(pictures) >= 6 and pictures <= numbers
