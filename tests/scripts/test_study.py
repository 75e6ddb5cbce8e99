"""The study's list of trainings, what is kept of their logs and translations, and its tables."""

import csv
import json
import shutil
import subprocess
import sys
from fcntl import LOCK_EX, flock

import numpy as np
import pytest
from evaluation_folders import sentences, worse, write_evaluation
from toy_task import BENCHMARK, REPOSITORY, run

from fairseq_smoe.benchmarks import benchmark as benchmarks

STUDY = REPOSITORY / "results" / "study"
SCRIPTS = ("study.py", "study_scores.py", "study_report.py", "study_speed.py", "result_files.py")
RUNS = {
    "short": {
        "benchmark": "study-m4.json",
        "options": {"--max-update": "50"},
        "subsets": ["test1"],
        "trainings": [{"row": "vanilla-moe", "seed": 7, "lr": "4e-3"}],
    }
}

LOG = """\
{"epoch": 1, "loss": "9.5", "nll_loss": "9.1", "wpb": "1000", \
"num_updates": "25", "encoder_requested_capacity": "2.1", "decoder_requested_capacity": "2.2", "wall": "9"}
{"epoch": 1, "loss": "8.5", "nll_loss": "8.1", "wpb": "1200", \
"num_updates": "50", "encoder_requested_capacity": "2.1", "decoder_requested_capacity": "2.2", "wall": "18"}
{"epoch": 1, "loss": "8.4", "nll_loss": "8.0", "wpb": "1200", \
"num_updates": "50", "encoder_requested_capacity": "2.1", "decoder_requested_capacity": "2.2", "wall": "30"}
{"epoch": 1, "flores_loss": "9.9", "flores_nll_loss": "9.7", \
"flores_num_updates": "50"}
"""


@pytest.fixture
def study(monkeypatch):
    """The modules of the study."""
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    return __import__("study")


@pytest.fixture
def copy(tmp_path):
    """A folder with the scripts, and a study of one training."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "results" / "study").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(REPOSITORY / "scripts" / name, tmp_path / "scripts")
    shutil.copy(STUDY / "study-m4.json", tmp_path / "results" / "study")
    (tmp_path / "results" / "study" / "runs.json").write_text(json.dumps(RUNS))
    return tmp_path


def run_study(copy, *words, script="study.py"):
    return subprocess.run(
        [sys.executable, copy / "scripts" / script, "--runs", copy / "runs", *map(str, words)],
        check=True,
        capture_output=True,
        text=True,
    )


def test_every_training_is_one_of_its_benchmark(study):
    trainings = study.read_trainings(STUDY / "runs.json")
    names = [(training.group, training.name) for training in trainings]
    assert len(set(names)) == len(names) > 0
    for training in trainings:
        benchmark = benchmarks.load(str(STUDY / training.benchmark))
        assert benchmark.row(training.row).slug == training.row


def test_losses_are_collected_once_with_the_tokens_so_far(copy):
    folder = copy / "runs" / "short" / "vanilla-moe-lr4e-3-seed7"
    folder.mkdir(parents=True)
    (folder / "train.log").write_text(LOG)
    losses = copy / "results" / "study" / "losses-short.csv"
    run_study(copy, "--only-collect")
    rows = list(csv.DictReader(losses.read_text().splitlines()))
    found = [(r["kind"], r["updates"], r["loss"], r["target_tokens"], r["seconds"]) for r in rows]
    assert found == [
        ("train", "25", "9.5", "25000", "9"),
        ("train", "50", "8.4", "55000", "30"),
        ("flores", "50", "9.9", "55000", ""),
    ]
    # without the run folder, the lines stay
    before = losses.read_text()
    shutil.rmtree(folder)
    run_study(copy, "--only-collect")
    assert losses.read_text() == before


def test_a_training_that_another_process_has_is_left_to_it(copy):
    folder = copy / "runs" / "short" / "vanilla-moe-lr4e-3-seed7"
    folder.mkdir(parents=True)
    with open(folder / "study.lock", "w") as lock:
        flock(lock, LOCK_EX)
        outcome = run_study(copy, "--data", copy / "nowhere")
    assert "==" not in outcome.stdout and not (folder / "train.log").exists()


@pytest.mark.slow
def test_trained_models_take_turns_with_the_dense_one(copy, text, tmp_path):
    size = {"layers": 2, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
    toy = copy / "results" / "study" / "toy.json"
    toy.write_text(json.dumps({**BENCHMARK, "size": size, "vocab_size": 19}))
    trainings = [{"row": row, "seed": 1, "lr": "4e-3"} for row in ("dense", "vanilla-moe")]
    group = {"benchmark": toy.name, "options": {"--max-update": "30"}, "trainings": trainings}
    (toy.parent / "runs.json").write_text(json.dumps({"family": group}))
    run(
        *("python", "-m", "fairseq_smoe", "prepare", "--benchmark", toy, "--from", text),
        *("--to", tmp_path / "data" / "toy", "--duplicates", "keep", "--held-out", "keep"),
    )
    run_study(copy, "--data", tmp_path / "data")
    last = copy / "runs" / "family" / "dense-lr4e-3-seed1" / "checkpoints" / "checkpoint_last.pt"
    before = last.read_bytes()
    words = ("--direction", "en-aa", "--subset", "test", "--shards", 1, "--rounds", 1)
    run_study(copy, "--data", tmp_path / "data", *words, script="study_speed.py")
    lines = csv.DictReader((toy.parent / "speeds.csv").read_text().splitlines())
    speeds = {(x["row"], x["kind"]): float(x["tokens_per_second"]) for x in lines}
    assert speeds.keys() == {("vanilla-moe", "training"), ("vanilla-moe", "beam search")}
    assert min(speeds.values()) > 0
    assert last.read_bytes() == before  # it was not trained on


def test_scores_and_draws_are_kept_for_later_comparisons(copy, tmp_path, study, monkeypatch):
    import study_scores

    from fairseq_smoe.evaluation.translation_metrics import bleu

    monkeypatch.setattr(study_scores, "STUDY", copy / "results" / "study")
    (training,) = study.read_trainings(copy / "results" / "study" / "runs.json")
    texts = {direction: sentences(40, seed=i) for i, direction in enumerate(["de-en", "en-de"])}
    for share in (0.5, 0.2):  # scored again, the new ones take the place of the old
        folder = tmp_path / f"run-{share}"
        translated = {name: (worse(lines, share), lines) for name, lines in texts.items()}
        run_scoring(write_evaluation(folder, translated, subset="test1"))
        study_scores.add(training, folder)
    assert study_scores.are_complete(training)
    lines = study_scores.read_csv(study_scores.scores_file())
    means = {line["direction"]: float(line["bleu"]) for line in lines}
    expected = {name: bleu().corpus_score(*pair) for name, pair in translated.items()}
    assert means == pytest.approx({**expected, "mean": np.mean([*expected.values()])}, abs=0.01)
    (draws,) = study_scores.read_csv(study_scores.draws_file("itest"))
    scores = [float(draws[name]) for name in draws if name.startswith("draw")]
    assert len(scores) == 1000 and np.mean(scores) == pytest.approx(means["mean"], abs=1.5)


def run_scoring(folder):
    from argparse import ArgumentParser

    from fairseq_smoe.evaluation import scoring

    parser = ArgumentParser()
    scoring.add_scoring_options(parser)
    scoring.score_folder(folder, parser.parse_args(["--metrics", "bleu", "chrf++"]), {})


def test_the_tables_of_the_page_are_those_of_the_files(study):
    import study_report

    text = study_report.README.read_text()
    assert study_report.filled(text) == text
    assert text.count("<!-- end -->") == len(study_report.TABLES)
    # and they would change with the files
    name = "<!-- rate -->"
    start, end = text.index(name) + len(name), text.index("<!-- end -->")
    assert study_report.filled(text[:start] + "\n\n" + text[end:]) == text
