"""Stopping and going on: by force, from another model. More processes: test_expert_parallel.py."""

import signal
import subprocess
import time

import pytest
import torch
import toy_task
from toy_task import REPOSITORY, environment, run, train, train_command

STEP = 50  # updates between checkpoints; 2 * STEP crosses the end of the first epoch


@pytest.fixture(scope="module")
def uninterrupted(make_once, data):
    """A training of 2 * STEP updates, logging each: its JSON log and checkpoints."""

    def make(folder):
        outcome = train(data, folder, *toy_task.MODELS["smoe"], **INTERVAL_CHECKPOINTS)
        (folder / "stdout").write_text(outcome.stdout)

    return make_once("uninterrupted", make)


INTERVAL_CHECKPOINTS = {"max_update": 2 * STEP, "save_interval_updates": STEP, "log_interval": 1}


def losses_by_update(stdout):
    records = toy_task.Outcome([], 0, stdout, "").log("train_inner")
    return {record["num_updates"]: record["loss"] for record in records}


def assert_same_state(path, other):
    """Parameters and optimizer states are equal to the last bit."""
    first, second = (torch.load(file, weights_only=False) for file in (path, other))
    assert first["model"].keys() == second["model"].keys()
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    (moments, others) = (state["last_optimizer_state"]["state"] for state in (first, second))
    assert moments.keys() == others.keys() and moments
    for index in moments:
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[index][name], others[index][name]), (index, name)


def test_goes_on_after_kill_9_as_if_nothing_had_happened(data, uninterrupted, tmp_path):
    command = train_command(data, tmp_path, *toy_task.MODELS["smoe"], **INTERVAL_CHECKPOINTS)
    log = tmp_path / "killed.log"
    with open(log, "w") as output:
        killed = subprocess.Popen(
            command, env=environment(), cwd=REPOSITORY, stdout=output, stderr=output
        )
        while not any(update > STEP + 3 for update in losses_by_update(log.read_text())):
            assert killed.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / f"checkpoint_1_{2 * STEP}.pt").exists()

    resumed = run(*command)
    assert f"@ {STEP} updates" in resumed.stdout
    expected = losses_by_update((uninterrupted / "stdout").read_text())
    actual = losses_by_update(resumed.stdout)
    assert list(actual) == list(range(STEP + 1, 2 * STEP + 1))
    assert actual == {update: expected[update] for update in actual}
    assert_same_state(tmp_path / "checkpoint_last.pt", uninterrupted / "checkpoint_last.pt")


def test_finetune_from_model_starts_a_new_training_with_the_old_parameters(data, trained, tmp_path):
    """The first updates of the new training already have the small loss of the old one's end."""
    options = {"max_update": 3, "log_interval": 1, "no_save": True, "lr": 1e-5, "dropout": 0}
    scratch = train(data, tmp_path, *toy_task.MODELS["smoe"], **options)
    tuned = train(
        data, tmp_path, *toy_task.MODELS["smoe"], **options, finetune_from_model=trained("smoe")
    )
    assert [record["num_updates"] for record in tuned.log("train_inner")] == [1, 2, 3]
    assert max(tuned.losses()) < 1 < min(scratch.losses())
