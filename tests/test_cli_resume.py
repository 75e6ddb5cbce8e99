"""Stopping and going on: by force, in another number of processes, from another model."""

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


def test_finetune_from_model_starts_a_new_training_with_the_old_parameters(
    data, trained, tmp_path
):
    """The first updates of the new training already have the small loss of the old one's end."""
    options = {"max_update": 3, "log_interval": 1, "no_save": True, "lr": 1e-5, "dropout": 0}
    scratch = train(data, tmp_path, *toy_task.MODELS["smoe"], **options)
    tuned = train(
        data, tmp_path, *toy_task.MODELS["smoe"], **options, finetune_from_model=trained("smoe")
    )
    assert [record["num_updates"] for record in tuned.log("train_inner")] == [1, 2, 3]
    assert max(tuned.losses()) < 1 < min(scratch.losses())


# --------------------------------------------------------------------------------------
# two processes


def torchrun(*command, check=True):
    """Run a command in two processes on this machine, as ``torchrun`` does on many."""
    return run(
        *("torchrun", "--standalone", "--nproc_per_node", 2, "--no-python", *command), check=check
    )


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_processes_train_one_model_and_resume(backend, data, tmp_path):
    """torchrun is all it takes: fairseq counts GPUs, the plugin the processes."""
    options = {"ddp_backend": backend, "log_interval": 1, "dropout": 0}
    command = train_command(data, tmp_path, *toy_task.MODELS["smoe"], **options)
    first = torchrun(*command, "--max-update", 10)
    assert "training on 2 devices" in first.stdout
    assert "distributed init (rank 1)" in first.stdout + first.stderr
    losses = losses_by_update(first.stdout)
    assert list(losses) == list(range(1, 11)), "one process logs, for both"
    assert losses[10] < losses[1]

    second = torchrun(*command, "--max-update", 15)
    assert list(losses_by_update(second.stdout)) == list(range(11, 16))


def test_two_processes_compute_what_one_does_on_twice_the_batch(data, tmp_path):
    """Without anything random or dropped: the mean gradient of two batches is the same, whether
    two processes have one each, or one process has both (--update-freq 2). Also the checkpoint of
    two processes is one that a single process goes on from."""
    options = {
        "max_update": 2,
        "dropout": 0,
        "moe_second_expert_policy": "all",
        "moe_capacity_factor": 0,
        "optimizer": "sgd",  # Adam divides by the gradient's size, also where it is mere rounding
        "lr": 0.1,
        "lr_scheduler": "fixed",
        "warmup_updates": None,
        "total_num_update": None,
        "max_tokens": 400,
    }
    states = {}
    for name, start, more in (
        ("one", run, {"update_freq": 2}),
        ("two", torchrun, {"update_freq": 1}),
    ):
        folder = tmp_path / name
        start(*train_command(data, folder, *toy_task.MODELS["smoe"], **options, **more))
        states[name] = torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"]
    for name, tensor in states["one"].items():
        torch.testing.assert_close(tensor, states["two"][name], rtol=0, atol=1e-5, msg=name)

    options["max_update"] = 3
    resumed = train(data, tmp_path / "two", *toy_task.MODELS["smoe"], **options, log_interval=1)
    assert list(losses_by_update(resumed.stdout)) == [3]
