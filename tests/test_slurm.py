"""scripts/train.slurm with stand-ins for SLURM's commands and torchrun: who gets which signal, and
when the job is queued again. Real bash, processes and signals."""

import os
import signal
import subprocess
import time

import pytest
import toy_task

SCRIPT = toy_task.REPOSITORY / "scripts" / "train.slurm"

STAND_INS = {
    # runs the command, as the one task of the one node
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$FOLDER/queued"; fi',
    # starts one rank, and fails if that fails, as torchrun does
    "torchrun": 'LOCAL_RANK=0 "$FOLDER/rank" & wait $!',
}
# a training: notes the signal, takes a while to save, and ends as ours do
RANK = """
trap 'echo USR1 >>"$FOLDER/signals"; sleep 0.3; touch "$FOLDER/saved"; exit 138' USR1
touch "$FOLDER/started"
for _ in $(seq 100); do sleep 0.05; [[ -e $FOLDER/finish ]] && exit "$(<"$FOLDER/finish")"; done
"""


@pytest.fixture(params=[60])
def job(tmp_path, request):
    """The script as SLURM runs it, for so many seconds already: ``(process, folder)``."""
    for name, body in {**STAND_INS, "rank": RANK}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),  # of no other job on this machine
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SECONDS": str(request.param),  # where bash counts on from
    }
    process = subprocess.Popen(
        ["bash", SCRIPT, "m4", "dense"], env=environment, start_new_session=True
    )
    wait_for(tmp_path / "started")
    yield process, tmp_path
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(path):
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def test_at_the_limit_the_training_is_saved_and_queued_again(job):
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 138
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
    assert process.wait(10) == 138
    assert (folder / "saved").exists() and not (folder / "queued").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_at_its_end_it_is_not_queued_again(status, job):
    process, folder = job
    (folder / "finish").write_text(f"{status}\n")
    assert process.wait(10) == status
    assert not (folder / "queued").exists() and not (folder / "signals").exists()


def test_a_training_that_ends_before_the_signal_reaches_it_is_not_queued_again(job):
    process, folder = job
    (folder / "finish").write_text("0\n")
    process.send_signal(signal.SIGUSR1)
    if process.wait(10) == 0:
        assert not (folder / "queued").exists()
