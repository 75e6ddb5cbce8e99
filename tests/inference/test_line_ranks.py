"""``python -m fairseq_smoe translate`` under torchrun: the file of one process."""

import os
import re
import signal
import subprocess
import time

import pytest
import toy_task
from fork_server import COMMANDS
from ranks import ranks_of

from fairseq_smoe.inference.line_files import Job, Lines
from fairseq_smoe.inference.line_ranks import _blocks

WORDS = ("--source", "en", "--target", "aa")


def command(model, processes, *words):
    torchrun = (COMMANDS / "torchrun", "--standalone", "--nproc_per_node", processes)
    tool = ("--no-python", "--", "python", "-m", "fairseq_smoe", "translate", model, *WORDS)
    return list(map(str, (*torchrun, *tool, *words)))


def test_a_killed_rank_is_made_up_for_by_the_same_command(spoken, generated, tmp_path):
    own = generated["en-aa"]
    path, output, parts = tmp_path / "text", tmp_path / "output", tmp_path / "output.parts"
    path.write_text("".join(f"{line}\n" for line in own.sources * 20))
    words = ("--input", path, "--output", output, "--chunk", "20")
    with subprocess.Popen(
        command(spoken, 2, *words),
        env={**toy_task.environment(), "PYTHONPATH": str(toy_task.REPOSITORY)},
        cwd=toy_task.REPOSITORY,
        stderr=subprocess.PIPE,
    ) as process:
        part = tmp_path / "output.part"
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        process.communicate()
    assert process.returncode and not output.exists()
    assert 0 < part.read_text().count("\n") < len(own.lines * 20)
    outcome = toy_task.run(*command(spoken, 2, *words))
    assert "goes on behind line" in outcome.stderr
    assert output.read_text().splitlines() == own.lines * 20
    assert not parts.exists() and not part.exists()


@pytest.mark.slow
def test_a_line_that_is_no_text_is_told_once_behind_the_lines_before_it(
    spoken, generated, tmp_path
):
    own = generated["en-aa"]
    path, output = tmp_path / "text", tmp_path / "output"
    good = "".join(f"{line}\n" for line in own.sources)
    path.write_bytes(good.encode() + b"\xff\n" + good.encode())
    words = ("--input", path, "--output", output)
    outcome = toy_task.run(*command(spoken, 2, *words, "--chunk", "7"), check=False)
    (line,) = re.findall("^error: .*", outcome.stderr, re.MULTILINE)
    assert f"{path}, line {len(own.sources) + 1}: is no UTF-8 text" in line
    assert (tmp_path / "output.part").read_text().splitlines() == own.lines


@pytest.mark.parametrize("known", [[], [(5, 4), (9, 100), (950, 50)]])
def test_blocks_are_shared_by_bytes_and_leave_out_what_is_known(known, tmp_path):
    class Three:
        size = 3

    path = tmp_path / "text"
    path.write_text("".join(f"{i} {'x' * (i % 90)}\n" for i in range(1000)))
    plan = {"done": 3, "known": known, "most_bytes": 1500}
    job = Job("en", "aa", {}, chunk=40)
    with open(path, "rb") as file:
        blocks = list(_blocks(Three, Lines(file, path, "error"), job, plan))
    starts = [block.start for block in blocks]
    assert starts == [3, *(block.start + block.number for block in blocks)][:-1]
    assert blocks[-1].start + blocks[-1].number == 1000
    assert [(b.start, b.number) for b in blocks if b.owner is None] == known
    work = [[b for b in blocks if b.owner == rank] for rank in range(3)]
    sizes = [sum(sum(map(len, b.lines)) for b in own) for own in work]
    assert max(sizes) - min(sizes) < 2500
    assert all(b.number <= 40 for own in work for b in own)
