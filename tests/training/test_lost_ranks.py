"""Processes that all are there, but do not run the same step: this is said, not that one is dead.
Those that die are in test_survival.py."""

import re

import pytest
import toy_task
from toy_task import run, train_command

# two processes, with the plugin's way to print errors, of which one does something else
SCRIPT = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from fairseq_smoe.training import compat, lost_ranks

compat.print_user_errors_in_one_line()
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
lost_ranks.sign_in()
first = dist.get_rank() == 0


def add_up(n):
    dist.all_reduce(torch.ones(n))


def exchange(n):
    dist.all_to_all_single(torch.empty(n), torch.ones(n))


add_up(3)
{what}
"""
OUT_OF_STEP = "the processes do not run the same step of the training"


@pytest.mark.parametrize(
    "what, said",
    [
        ("add_up(10 if first else 100_000)", ""),
        (
            "add_up(10) if first else exchange(20)",
            ": rank 0 in __main__.add_up, rank 1 in __main__.exchange",
        ),
    ],
    ids=["data of other sizes", "other functions"],
)
def test_processes_that_are_out_of_step(what, said, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(what=what))
    outcome = run("torchrun", "--standalone", "--nproc_per_node", 2, script, check=False)
    assert outcome.returncode == 1
    printed = outcome.stdout + outcome.stderr
    assert re.search(rf"^error: rank \d: {OUT_OF_STEP}{said}", printed, re.M), outcome.tail()
    assert "died" not in printed


@pytest.mark.slow
def test_a_training_whose_processes_make_other_steps(data, tmp_path):
    """One has two batches an update."""
    command = train_command(data, tmp_path, "--smoe-strata", "2-2", distributed_timeout=5)
    line = " ".join(command) + " --update-freq $((RANK + 1))"
    start = ["torchrun", "--standalone", "--nproc_per_node", 2, "--no-python"]
    outcome = run(*start, "bash", "-c", line, cwd=toy_task.REPOSITORY, check=False)
    assert outcome.returncode == 1
    printed = outcome.stdout + outcome.stderr
    assert re.search(rf"^error: rank \d: {OUT_OF_STEP}", printed, re.M), outcome.tail()
    assert "died" not in printed
