"""Processes that load data, when a training is asked to stop."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader
from toy_task import environment

from fairseq_smoe.training.stop_signal import STOP_SIGNALS, StopSignal


@pytest.fixture
def loading():
    """A loader that is at work, and its processes."""
    stop_signal = StopSignal()
    before = set(multiprocessing.active_children())
    batches = iter(DataLoader(range(100), num_workers=2))
    next(batches)
    yield batches, set(multiprocessing.active_children()) - before
    del batches, stop_signal


def test_it_goes_on_when_others_send_the_signal(loading):
    batches, loaders = loading
    for number in STOP_SIGNALS:
        # kill is a process of its own, and so not the one that they load data for
        subprocess.run(["kill", f"-{number}", *(str(p.pid) for p in loaders)], check=True)
    assert len(loaders) == 2 and len(list(batches)) == 99
    for loader in loaders:
        loader.join(10)
        assert loader.exitcode == 0


def test_it_ends_when_its_process_sends_the_signal(loading):
    _, loaders = loading
    for loader in loaders:
        loader.terminate()
        loader.join(10)
        assert loader.exitcode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_its_process(number):
    """Which nothing has been told to do with the signal, and so dies of it."""
    script = (
        "from torch.utils.data import DataLoader; from fairseq_smoe.training.stop_signal import StopSignal\n"
        "import multiprocessing, time\n"
        "stop_signal = StopSignal(); batches = iter(DataLoader(range(100), num_workers=2))\n"
        "next(batches); next(batches)\n"  # before, they would not know yet whose end to look for
        "print(*(p.pid for p in multiprocessing.active_children()), flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    loaders = process.stdout.readline().split()
    assert len(loaders) == 2 and all(map(is_running, loaders))
    process.send_signal(number)
    assert process.wait(10) == -number
    deadline = time.monotonic() + 30
    while any(map(is_running, loaders)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    try:
        return open(f"/proc/{int(pid)}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
