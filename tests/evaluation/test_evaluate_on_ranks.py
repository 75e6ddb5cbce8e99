"""``evaluate`` under torchrun: the files of one process, and what happens when a rank dies."""

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time

import pytest
import toy_task
from fork_server import COMMANDS
from ranks import ranks_of
from test_evaluate import make_run, read

from fairseq_smoe.evaluation.batches import in_batches
from fairseq_smoe.evaluation.shares import divide

MARK = b"marked"
OPTIONS = ("--beam", "4", "--cpu", "--no-score", "--max-tokens", "40")


def command(run, processes, *words):
    torchrun = (COMMANDS / "torchrun", "--standalone", "--nproc_per_node", processes)
    # behind --, because torchrun would take --run for an option of its own
    tool = ("--no-python", "--", "python", "-m", "fairseq_smoe", "evaluate", "--run", run)
    return list(map(str, (*torchrun, *tool, *OPTIONS, *words)))


@pytest.fixture
def run(data, trained, tmp_path):
    return make_run(tmp_path / "run", trained("smoe"))


@pytest.fixture(scope="module")
def of_one_process(make_once, data, trained):
    """Files of all directions."""

    def make(folder):
        run = make_run(folder / "run", trained("smoe"))
        words = ("python", "-m", "fairseq_smoe", "evaluate", "--run", run, "--processes", 1)
        toy_task.run(*words, *OPTIONS)

    return read(make_once("evaluation-of-one", make) / "run" / "evaluation" / "test")


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_made_up_for_by_the_same_command(killed, run, of_one_process):
    """And what was complete is not translated again, on another number of ranks."""
    folder = run / "evaluation" / "test"
    environment = toy_task.environment()
    with subprocess.Popen(
        command(run, 2), env=environment, cwd=toy_task.REPOSITORY, stderr=subprocess.PIPE
    ) as process:
        while not list((folder / "parts").glob("*-*.*.json")):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        os.kill(ranks_of(process.pid)[killed], signal.SIGKILL)
        process.communicate()
    assert process.returncode
    parts = list((folder / "parts").glob("*-*.*.json"))
    assert parts and not list(folder.glob("*-*.json"))
    direction, index = mark_first_sentence(parts[0])
    toy_task.run(*command(run, 3))
    found = read(folder)
    for name in (f"{direction}.hyp.txt", f"{direction}.hyp.pieces"):
        lines = found[name].splitlines()
        assert lines[index] == MARK  # what was complete is not translated again
        lines[index] = of_one_process[name].splitlines()[index]
        found[name] = b"".join(line + b"\n" for line in lines)
    assert found == of_one_process
    assert not (folder / "parts").exists()


def mark_first_sentence(path):
    """Change the translation of a sentence in a part; returns its direction and number."""
    facts = json.loads(path.read_text())
    facts["hypotheses"][0] = MARK.decode()
    path.write_text(json.dumps(facts))
    return path.name.partition(".")[0], facts["indices"][0]


def test_a_mistake_is_told_once_in_one_line(run):
    outcome = toy_task.run(*command(run, 2, "--directions", "en-xx"), check=False)
    assert outcome.returncode
    (line,) = re.findall("^error: .*", outcome.stderr, re.MULTILINE)
    assert line.startswith("error: --directions en-xx: xx is none of the model's languages")


def test_shares_are_equal_and_complete():
    rng = random.Random(1)
    for ranks in (1, 2, 3, 16):
        for jobs in (1, 8):
            sizes = {
                job: {i: rng.randint(2, 80) for i in range(rng.randint(150, 600))}
                for job in range(jobs)
            }
            shares = divide(sizes, 12000, ranks)
            assert len(shares) == ranks
            found = sorted((job, i) for share in shares for job, part in share for i in part)
            assert found == sorted((job, i) for job, own in sizes.items() for i in own)
            loads = [
                sum(len(part) * max(sizes[job][i] for i in part) for job, part in share)
                for share in shares
            ]
            assert max(loads) < 1.2 * sum(loads) / ranks
            whole = [part for share in divide(sizes, 500, ranks, True) for _, part in share]
            assert sorted(whole) == sorted(
                batch for own in sizes.values() for batch in in_batches(list(own.values()), 500)
            )
            for share in shares:
                assert [job for job, _ in share] == sorted(job for job, _ in share)


@pytest.mark.slow
def test_a_rank_that_cannot_see_the_folder_is_named(run):
    """A machine whose folder is another one, as on a file system that is not shared."""
    folder = run / "evaluation"
    folder.mkdir()
    hidden = ("unshare", "-m", "bash", "-c", f'mount -t tmpfs none {folder} && exec "$@"', "-")
    if subprocess.run([*hidden, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    words = command(run, 2)
    tool = words.index("--") + 1
    script = f'[[ $RANK == 1 ]] && exec {shlex.join(hidden)} "$@"; exec "$@"'
    outcome = toy_task.run(*words[:tool], "bash", "-c", script, "-", *words[tool:], check=False)
    (line,) = re.findall("error: /.*", outcome.stderr)  # behind the first rank's progress bar
    assert f"{folder}/test/parts" in line and f"rank 1 ({socket.gethostname()}) cannot see" in line
