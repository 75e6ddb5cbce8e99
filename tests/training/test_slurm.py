"""scripts/train.slurm with stand-ins for SLURM's commands and torchrun: who gets which signal, and
when the job is queued again. Real bash, processes and signals."""

import os
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import toy_task

SCRIPT = toy_task.REPOSITORY / "scripts" / "train.slurm"

STAND_INS = {
    # runs the command, as the one task of the one node
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": """
case $1-$2 in
    show-hostnames) echo localhost ;;
    show-job) echo " PreemptEligibleTime=2030-01-01T00:00:00 PreemptTime=$(<"$FOLDER/preempted")" ;;
    *) echo "$@" >>"$FOLDER/queued" ;;
esac""",
    # starts one rank, and fails if that fails, whatever its exit code
    "torchrun": 'LOCAL_RANK=0 "$FOLDER/rank" & wait $! || exit 1',
}
# a training with a data loader: notes the signal, takes a while to save, and ends as ours do
RANK = """
sleep 20 & loader=$!
stop() {
    echo USR1 >>"$FOLDER/signals"
    sleep 0.3
    kill -0 "$loader" && touch "$FOLDER/saved"
    [[ -e $FOLDER/at_its_end ]] || exit 138
    exit 0
}
trap 'kill "$loader"' EXIT
trap stop USR1
touch "$FOLDER/started"
for _ in $(seq 100); do sleep 0.05; [[ -e $FOLDER/finish ]] && exit "$(<"$FOLDER/finish")"; done
"""


@contextmanager
def started(folder, stand_ins, script, *arguments, **variables):
    """A script as SLURM runs it."""
    for name, body in {**STAND_INS, **stand_ins}.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "preempted").write_text("None\n")
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "FOLDER": str(folder),
        "SLURM_JOB_NODELIST": "localhost",
        **variables,
    }
    process = subprocess.Popen(
        ["bash", script, *arguments], env=environment, start_new_session=True
    )
    wait_for(folder / "started")
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(params=[60])
def job(tmp_path, request):
    """The script as SLURM runs it, for so many seconds already: ``(process, folder)``."""
    variables = {
        "SLURM_JOB_ID": str(os.getpid()),  # of no other job on this machine
        "SLURM_NNODES": "1",
        "SECONDS": str(request.param),  # where bash counts on from
    }
    with started(tmp_path, {"rank": RANK}, SCRIPT, "m4", "dense", **variables) as process:
        yield process, tmp_path


def wait_for(path):
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_at_the_limit_the_training_is_saved_and_queued_again(job):
    process, folder = job
    other = {**os.environ, "SLURM_JOB_ID": f"{os.getpid()}0", "LOCAL_RANK": "0"}
    with subprocess.Popen(["sleep", "20"], env=other) as of_another_job:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10) == 1
        assert of_another_job.poll() is None
        of_another_job.kill()
    assert (folder / "signals").read_text() == "USR1\n" and (folder / "saved").exists()
    assert (folder / "queued").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.parametrize("job", [0], indirect=True)
def test_a_signal_at_its_beginning_is_of_a_limit_shorter_than_the_warning(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    (folder / "finish").write_text("0\n")
    assert process.wait(10) == 0
    assert not (folder / "signals").exists() and not (folder / "queued").exists()


def test_cancelled_it_is_saved_and_not_queued_again(job):
    process, folder = job
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert (folder / "saved").exists() and not (folder / "queued").exists()


def test_cancelled_while_it_saves_it_is_not_queued_again(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    wait_for(folder / "signals")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert (folder / "saved").exists() and not (folder / "queued").exists()


def test_preempted_it_is_queued_again(job):
    """With a grace time, SLURM signals the training alone, and takes its end for a failure."""
    process, folder = job
    (folder / "preempted").write_text("2030-01-01T00:00:00\n")
    (folder / "finish").write_text("143\n")
    assert process.wait(10) == 1
    assert (folder / "queued").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.parametrize("status", [0, 1])
def test_at_its_end_it_is_not_queued_again(status, job):
    process, folder = job
    (folder / "finish").write_text(f"{status}\n")
    assert process.wait(10) == status
    assert not (folder / "queued").exists() and not (folder / "signals").exists()


def test_at_its_end_as_well_as_at_the_limit_it_is_not_queued_again(job):
    process, folder = job
    (folder / "at_its_end").touch()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 0
    assert (folder / "signals").exists() and not (folder / "queued").exists()


# --------------------------------------------------------------------------------------
# scripts/translate.slurm

# does not go on behind a signal, and notes what it is to start
WORK = """
echo "$@" >"$FOLDER/arguments"
touch "$FOLDER/started"
for _ in $(seq 100); do sleep 0.05; [[ -e $FOLDER/finish ]] && exit "$(<"$FOLDER/finish")"; done
"""


@pytest.fixture
def translation(tmp_path):
    """The same for scripts/translate.slurm."""
    script, words = SCRIPT.with_name("translate.slurm"), ("evaluate", "m4", "dense")
    variables = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "2", "SECONDS": "60"}
    variables["SLURM_JOB_ID"] = "7"
    with started(tmp_path, {"torchrun": WORK}, script, *words, **variables) as process:
        yield process, tmp_path


def test_a_translation_is_queued_again_at_the_limit(translation):
    process, folder = translation
    words = (folder / "arguments").read_text().split()
    assert words[:4] == ["--nnodes", "3", "--nproc-per-node", "2"]
    assert words[-8:] == "--no-python -- python -m fairseq_smoe evaluate m4 dense".split()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) != 0
    assert (folder / "queued").read_text() == "requeue 7\n"


def test_a_translation_is_not_queued_again_when_cancelled(translation):
    process, folder = translation
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) != 0 and not (folder / "queued").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_a_translation_is_not_queued_again_at_its_end(status, translation):
    process, folder = translation
    (folder / "finish").write_text(f"{status}\n")
    assert process.wait(10) == status and not (folder / "queued").exists()
