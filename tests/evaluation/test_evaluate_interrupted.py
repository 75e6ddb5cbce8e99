"""``evaluate`` stopped anywhere, by Ctrl-C or by force, and run again; workers that die."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_task
from test_evaluate import change_binarised, evaluate_own, make_run, read
from toy_task import DIRECTIONS

# batches of a sentence or two: long enough to be stopped on the way
SLOW = ("--beam", "4", "--max-tokens", "7", "--cpu", "--no-score")


@pytest.fixture
def run(data, trained, tmp_path):
    return make_run(tmp_path / "run", trained("smoe"))


@pytest.fixture(scope="module")
def uninterrupted(make_once, data, trained):
    """Files of all directions, translated without a break."""

    def make(folder):
        evaluate_own(make_run(folder / "run", trained("smoe")))

    return read(make_once("uninterrupted-evaluation", make) / "run" / "evaluation" / "test")


class Evaluation:
    """The real command, in a process group of its own as in a terminal."""

    def __init__(self, run, processes):
        self.folder = run / "evaluation" / "test"
        command = [sys.executable, "-m", "fairseq_smoe", "evaluate", "--run", str(run), *SLOW]
        self.errors = run / "stderr"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [*command, "--processes", str(processes)],
                env=toy_task.environment(),
                cwd=toy_task.REPOSITORY,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.errors.read_text()
            time.sleep(0.005)

    def translated(self):
        return [path.stem for path in self.folder.glob("*-*.json")]

    def has_translated_some(self):
        """Of the first directions, some sentences."""
        return "translate:" in self.errors.read_text() and "0/" not in self.errors.read_text()[-60:]

    def workers(self):
        """Process ids of the children."""
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "kind, processes, directions",
    [
        (signal.SIGKILL, 1, 0),
        (signal.SIGINT, 1, 1),
        (signal.SIGINT, 2, 0),
        (signal.SIGKILL, 2, 1),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_goes_on_where_it_was_stopped(kind, processes, directions, run, uninterrupted, capsys):
    """Stopped when that many directions are done: the others are translated, and all files are
    those of an uninterrupted call."""
    evaluation = Evaluation(run, processes)
    if directions:
        evaluation.wait_for(lambda: len(evaluation.translated()) >= directions)
    else:
        evaluation.wait_for(evaluation.has_translated_some)
    workers = evaluation.workers()
    assert len(workers) == (0 if processes == 1 else processes)
    if kind == signal.SIGINT:
        os.killpg(evaluation.process.pid, kind)  # as the terminal does
        assert evaluation.process.wait() == 130
        errors = evaluation.errors.read_text()
        assert errors.endswith("stopped\n") and "Traceback" not in errors
    else:
        evaluation.process.send_signal(kind)
        assert evaluation.process.wait() == -kind
    patience = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < patience, "workers go on"
        time.sleep(0.02)

    done = evaluation.translated()
    assert directions <= len(done) < len(DIRECTIONS)
    times = {d: (evaluation.folder / f"{d}.json").stat().st_mtime_ns for d in done}
    evaluate_own(run)
    assert "again" not in capsys.readouterr().err
    assert read(evaluation.folder) == uninterrupted
    for direction, before in times.items():
        assert (evaluation.folder / f"{direction}.json").stat().st_mtime_ns == before
    assert not list(evaluation.folder.glob("*unfinished*"))


def test_a_worker_that_dies_ends_the_command_in_one_line(run):
    evaluation = Evaluation(run, 2)
    evaluation.wait_for(lambda: len(evaluation.workers()) == 2)
    evaluation.wait_for(evaluation.has_translated_some)
    first, second = evaluation.workers()
    os.kill(first, signal.SIGKILL)
    assert evaluation.process.wait() == 1
    last = evaluation.errors.read_text().splitlines()[-1]
    assert last.startswith("error: the worker for ") and "was ended by signal 9" in last
    assert "--max-tokens" in last and "Traceback" not in evaluation.errors.read_text()
    assert not is_running(second)


def test_a_sentence_that_is_too_long_loses_its_end(run, data, tmp_path):
    """The others, and the other directions, are translated as before; in two processes."""
    other = shutil.copytree(data, tmp_path / "data")
    for lang in ("en", "bb"):
        change_binarised(other / f"test.en-bb.{lang}", lambda old: [torch.cat(old * 10), *old])
    words = ("python", "-m", "fairseq_smoe", "evaluate", "--run", run, "--cpu", "--no-score")
    words += ("--directions", "en-bb,aa-en", "--processes", 2)
    outcome = toy_task.run(*words, "--data", other)
    assert "warning: test en-bb, line 1: more than the " in outcome.stderr
    with_long = (run / "evaluation/test/en-bb.hyp.txt").read_text().splitlines()
    toy_task.run(*words, "--data", data)
    assert with_long[1:] == (run / "evaluation/test/en-bb.hyp.txt").read_text().splitlines()
