"""Trainings in several processes that are asked to stop, killed, cut off, or run out of disk."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from toy_task import REPOSITORY, Outcome, environment, run, train_command

from fairseq_smoe.checkpoints.parts import num_updates, read_checkpoint

STEP = 5  # updates between checkpoints
MODEL = ("--smoe-strata", "2-2-2-2")
OPTIONS = {
    "max_update": 30,
    "save_interval_updates": STEP,
    "keep_interval_updates": 3,
    "log_interval": 1,
    "disable_validation": True,
}


def command(data, folder, processes=2, **options):
    train = train_command(data, folder, *MODEL, **{**OPTIONS, **options})
    if processes == 1:
        return train
    return ["torchrun", "--standalone", "--nproc_per_node", str(processes), "--no-python", *train]


class Training:
    """A training in the background, in a process group of its own."""

    def __init__(self, command, log, **popen):
        self.command, self.log = list(map(str, command)), log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                self.command,
                env=environment(),
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **popen,
            )

    def wait_for_update(self, number):
        """Until that update is in the log."""
        self.wait_for(lambda: any(update >= number for update in losses(self.printed())))

    def wait_for(self, condition, patience=120):
        deadline = time.monotonic() + patience
        while not condition():
            assert self.process.poll() is None, self.outcome().tail()
            assert time.monotonic() < deadline, self.printed()[-3000:]
            time.sleep(0.02)

    def printed(self):
        return self.log.read_text()

    def ranks(self):
        """Process ids of the ranks, in their order; not of what loads data for them."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                variables = open(f"/proc/{pid}/environ").read().split("\0")
                parent = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1]
                rank = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
                if rank and int(parent) == self.process.pid:
                    found[int(rank[0])] = int(pid)
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout=120):
        """To the end, of all of its processes."""
        try:
            self.process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.outcome()

    def outcome(self):
        return Outcome(self.command, self.process.poll(), self.printed(), "")


def losses(printed):
    """``{update: loss}`` of a log that may still be written."""
    found = {}
    for record in re.findall(r"\| train_inner \| (\{.*\})$", printed, re.MULTILINE):
        update, loss = (
            re.search(rf'"{name}": "([^"]+)"', record) for name in ("num_updates", "loss")
        )
        found[int(update[1])] = float(loss[1])
    return found


def loaded_update(outcome):
    return int(re.search(r"Loaded checkpoint \S+ \(epoch \d+ @ (\d+) updates\)", outcome.stdout)[1])


@pytest.fixture(scope="module")
def unbroken(make_once, data):
    """Losses of a training by two processes that nothing happens to."""

    def make(folder):
        outcome = run(*command(data, folder / "run"))
        (folder / "log").write_text(outcome.stdout)

    return losses((make_once("unbroken", make) / "log").read_text())


def assert_goes_on(data, folder, unbroken, from_update):
    """The same command again trains on from there as if nothing had happened."""
    resumed = run(*command(data, folder))
    assert loaded_update(resumed) == from_update
    found = losses(resumed.stdout)
    assert found == {n: unbroken[n] for n in range(from_update + 1, OPTIONS["max_update"] + 1)}


# --------------------------------------------------------------------------------------
# asked to stop


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_all_processes(number, data, tmp_path, unbroken):
    """SIGTERM to everything that runs, as clusters send it, also to what loads data; SIGUSR1 to one
    rank alone, from which the other has to learn it."""
    training = Training(command(data, tmp_path, num_workers=2), tmp_path / "log")
    training.wait_for_update(STEP + 2)
    if number == signal.SIGTERM:
        os.killpg(training.process.pid, number)
    else:
        os.kill(training.ranks()[1], number)
    outcome = training.wait()
    assert outcome.returncode != 0
    assert "[rank" not in outcome.stdout, "torch puts this before what an error prints"
    stopped = int(
        re.search(r"asked to stop: saving, and ending after update (\d+)", outcome.stdout)[1]
    )
    assert stopped > STEP and stopped % STEP
    if number == signal.SIGUSR1:  # of which torchrun itself knows nothing
        codes = re.findall(r"^  exitcode +: (\S+)", outcome.stdout, re.M)
        # as soon as one ends, torchrun ends the other, which has nothing left to do
        assert "138" in codes and set(codes) <= {"138", "143", "-15"}, outcome.tail()
    assert_goes_on(data, tmp_path, unbroken, stopped)


def test_a_signal_during_validation_does_not_wait_for_its_end(data, tmp_path):
    options = {
        "disable_validation": False,
        "validate_interval_updates": 3,
        "save_interval_updates": 0,
    }
    options["max_tokens_valid"] = 10  # a batch for every sentence: it takes a while
    training = Training(command(data, tmp_path, 1, **options), tmp_path / "log")
    begun = 'begin validation on "valid" subset'
    training.wait_for(lambda: begun in training.printed())
    training.process.send_signal(signal.SIGTERM)
    outcome = training.wait()
    assert outcome.returncode == 128 + signal.SIGTERM
    assert "ending after update 3" in outcome.stdout and not outcome.log("valid")
    assert (tmp_path / "checkpoint_last.pt").exists()


# --------------------------------------------------------------------------------------
# killed


def kill_one_rank(data, folder, log, rng, updates):
    """Start or go on, and kill a rank at some moment; the updates that were made."""
    training = Training(command(data, folder), log)
    training.wait_for_update(updates)
    time.sleep(rng.random() * 0.5)
    ranks = training.ranks()
    victim = rng.randrange(len(ranks))
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    outcome = training.wait(60)
    assert time.monotonic() - killed < 40, "the others notice it"
    assert outcome.returncode != 0
    assert re.search(rf"rank +: {victim} .*\n +exitcode +: -9", outcome.stdout), "torchrun names it"
    return outcome, victim


def kill_again_and_again(data, folder, unbroken, points):
    """At random moments, until the training is at its end; nothing but updates since the last
    checkpoint is ever lost."""
    rng = random.Random(points)
    folder.mkdir()
    log = folder.parent / "log"
    saved = 0
    for _ in range(points):
        # near the end there is nothing to kill: begin anew
        if saved > OPTIONS["max_update"] - 2 * STEP:
            shutil.rmtree(folder)
            folder.mkdir()
            saved = 0
        outcome, _ = kill_one_rank(data, folder, log, rng, saved + rng.randint(1, STEP + 2))
        found = losses(outcome.stdout)
        assert found == {n: unbroken[n] for n in found}
        assert min(found) == saved + 1, "goes on from the last checkpoint"
        last = folder / "checkpoint_last.pt"
        saved = num_updates(read_checkpoint(last)) if last.exists() else 0
        assert saved >= max(found) // STEP * STEP - STEP
    if saved:
        assert_goes_on(data, folder, unbroken, saved)


@pytest.mark.slow
def test_killed_at_a_random_moment(data, tmp_path, unbroken):
    kill_again_and_again(data, tmp_path / "run", unbroken, points=2)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(data, tmp_path, unbroken):
    kill_again_and_again(data, tmp_path / "run", unbroken, points=20)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_process_that_does_not_answer_is_named(size, data, tmp_path):
    """It is stopped, not killed: its connections stay open, and torchrun sees nothing wrong."""
    options = {"distributed_timeout": 5, "max_update": 1000, "moe_expert_parallel_size": size}
    training = Training(command(data, tmp_path, **options), tmp_path / "log")
    training.wait_for_update(2)
    silent = training.ranks()[1]
    os.kill(silent, signal.SIGSTOP)
    training.wait_for(lambda: "error: " in training.printed(), patience=30)
    os.kill(silent, signal.SIGCONT)
    outcome = training.wait(90)
    assert outcome.returncode != 0
    assert re.search(
        r"error: rank 0: rank 1 \(.+\) has died or cannot be reached", outcome.stdout, re.M
    )


GREEDY = """
import os
import torch
from fairseq_smoe.moe.gates.top_k import TopKGate


class GreedyGate(TopKGate):
    name = None

    def forward(self, *args):
        if self.training == {in_training} and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(*args)
"""


@pytest.mark.parametrize(
    "in_training, option",
    [(True, "--max-tokens 700"), pytest.param(False, "--max-tokens-valid", marks=pytest.mark.slow)],
)
def test_memory_that_runs_out_in_one_process_ends_all(in_training, option, data, tmp_path):
    """fairseq would leave out this process's batch, or try it again, and the other would wait."""
    (tmp_path / "greedy.py").write_text(GREEDY.format(in_training=in_training))
    options = {"moe_gate": "greedy:GreedyGate", "disable_validation": False, "max_update": 2}
    options["user_dir"] = REPOSITORY / "fairseq_smoe"
    started = command(data, tmp_path / "run", moe_expert_parallel_size=2, **options)
    outcome = run(*started, cwd=tmp_path, check=False)
    assert outcome.returncode != 0
    message = f"error: {option}: rank 1 is out of memory, and the others wait for it"
    assert message in outcome.stderr, outcome.tail()


# --------------------------------------------------------------------------------------
# no space, damaged files


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(data, tmp_path):
    """The training goes on, says so, and ends with an error if its last checkpoint is not there."""
    script = tmp_path / "script.sh"
    folder = tmp_path / "small-disk"
    folder.mkdir()
    first, rest = (
        " ".join(map(str, command(data, folder, max_update=n, no_last_checkpoints=False)))
        for n in (STEP, 3 * STEP)
    )
    script.write_text(
        f"mount -t tmpfs -o size=40m none {folder} || exit 77\n"
        f"{first} || exit 1\n"
        f"free=$(df --output=avail -k {folder} | tail -n 1)\n"
        f"head -c $(((free - 100) * 1024)) /dev/zero >{folder}/filler\n"
        f"{rest}; echo ended with $?\n"
        f"python -m fairseq_smoe checkpoint inspect {folder}/checkpoint_last.pt\n"
        f"ls {folder}; rm {folder}/filler\n"
        f"{rest}; echo ended with $?\n"
    )
    outcome = run("unshare", "-m", "bash", script, check=False)
    if outcome.returncode == 77 or "unshare failed" in outcome.stderr:
        pytest.skip("mounting a small disk is not permitted here")
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, outcome.tail()
    messages = re.findall(
        r"no checkpoint of update (\d+), the previous one is kept: .*disk is full", printed
    )
    assert messages == [str(2 * STEP), str(3 * STEP)], outcome.tail()
    assert "error: the training ends without its last checkpoint" in printed
    assert "unfinished" not in outcome.stdout and f"updates{' ' * 17}{STEP}\n" in outcome.stdout
    assert re.findall(r"^ended with (\d+)$", outcome.stdout, re.M) == ["1", "0"]
    assert re.findall(r"Loaded checkpoint \S+ \(epoch 1 @ (\d+) updates", printed)[-1] == str(STEP)


def damage(path):
    """Change a byte in the middle of a file, in the place of the file: copies share its content."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.unlink()
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_on_demand_replaced(data, tmp_path):
    options = {"max_update": 2 * STEP + 2}
    run(*command(data, tmp_path, 1, **options))
    damage(tmp_path / "checkpoint_last.pt")
    options["max_update"] += 1
    refused = run(*command(data, tmp_path, 1, **options), check=False)
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert (
        f"{tmp_path}/checkpoint_last.pt: is damaged" in line and "Traceback" not in refused.stderr
    )

    outcome = run(*command(data, tmp_path, 2, **options, restore_fallback=True))
    assert f"checkpoint_last.pt is damaged, going on from {tmp_path}/checkpoint_1_10.pt" in (
        outcome.stdout + outcome.stderr
    )
    assert loaded_update(outcome) == 2 * STEP


def test_without_a_whole_checkpoint_nothing_is_trained(data, tmp_path):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"no checkpoint")
    outcome = run(*command(data, tmp_path, 1, restore_fallback=True), check=False)
    assert outcome.returncode != 0
    assert outcome.stderr.splitlines()[-1].startswith("error: --restore-fallback: neither")


# --------------------------------------------------------------------------------------
# launching


@pytest.mark.parametrize("more", [{}, {"distributed_init_method": "tcp://localhost:12345"}])
def test_processes_that_nobody_starts_are_an_error(more, data, tmp_path):
    options = {"distributed_world_size": 2, **more}
    outcome = run(*command(data, tmp_path, 1, **options), check=False)
    assert outcome.returncode != 0
    assert re.search(
        r"^error: --distributed-world-size 2: .*torchrun --nproc_per_node 2", outcome.stderr, re.M
    )
    assert not losses(outcome.stdout)


@pytest.mark.parametrize(
    "processes, options, message",
    [
        (1, {"moe_expert_parallel_size": 2}, "this training has 1 process"),
        (1, {"moe_expert_parallel_size": 3}, "expected a divisor of the 8 experts"),
        (
            2,
            {"moe_expert_parallel_size": 4},
            "does not divide the 2 processes; expected one of 1, 2",
        ),
        (2, {"moe_expert_parallel_size": 2, "amp": True}, "use --bf16"),
        (2, {"moe_expert_parallel_size": 2, "store_ema": True}, "--store-ema with"),
        (2, {"quant_noise_pq": 0.1}, "with several processes: each would change the weights"),
        pytest.param(2, {"use_bmuf": True}, "--use-bmuf with", marks=pytest.mark.slow),
        pytest.param(2, {"zero_sharding": "os"}, "--zero-sharding os with", marks=pytest.mark.slow),
        (1, {"ddp_backend": "fully_sharded"}, "needs GPUs"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(processes, options, message, data, tmp_path):
    outcome = run(*command(data, tmp_path, processes, **options), check=False)
    assert outcome.returncode != 0
    lines = {n for n in outcome.stderr.splitlines() if re.search(r"error: --\S+ ?\d?", n)}
    assert lines and all(message in line for line in lines), outcome.tail()
    assert not losses(outcome.stdout)
