"""The study's list of trainings, and what is kept of their logs."""

import csv
import json
import shutil
import subprocess
import sys

from toy_task import REPOSITORY

from fairseq_smoe.benchmarks import benchmark as benchmarks

STUDY = REPOSITORY / "results" / "study"
RUNS = json.loads((STUDY / "runs.json").read_text())

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


def test_every_training_is_one_of_its_benchmark():
    names = [(run["group"], run["row"], run["options"]["--lr"], run["seed"]) for run in RUNS]
    assert len(set(names)) == len(names)
    for run in RUNS:
        benchmark = benchmarks.load(str(STUDY / run["benchmark"]))
        assert benchmark.row(run["row"]).slug == run["row"]


def test_losses_are_collected_once_with_the_tokens_so_far(tmp_path):
    copy = tmp_path / "scripts" / "study.py"
    copy.parent.mkdir()
    copy.write_bytes((REPOSITORY / "scripts" / "study.py").read_bytes())
    study = tmp_path / "results" / "study"
    study.mkdir(parents=True)
    (study / "runs.json").write_text(json.dumps(RUNS[:2]))
    run = RUNS[0]
    folder = tmp_path / "runs" / run["group"] / f"{run['row']}-lr{run['options']['--lr']}-seed7"
    folder.mkdir(parents=True)
    (folder / "train.log").write_text(LOG)
    losses = study / f"losses-{run['group']}.csv"

    def collect():
        subprocess.run(
            [sys.executable, copy, "--runs", tmp_path / "runs", "--only-collect"], check=True
        )
        return losses.read_text()

    rows = list(csv.DictReader(collect().splitlines()))
    found = [(r["kind"], r["updates"], r["loss"], r["target_tokens"], r["seconds"]) for r in rows]
    assert found == [
        ("train", "25", "9.5", "25000", "9"),
        ("train", "50", "8.4", "55000", "30"),
        ("flores", "50", "9.9", "55000", ""),
    ]
    # without the run folder, the lines stay
    before = losses.read_text()
    shutil.rmtree(folder)
    assert collect() == before
