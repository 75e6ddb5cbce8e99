"""A Dask cluster of real processes, which talk over TCP."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 60  # until a process answers
REPOSITORY = Path(__file__).resolve().parents[1]


class DaskProcesses:
    """A scheduler and its workers, as ``dask scheduler`` and ``dask worker`` start them.

    Args:
        folder: for their files; is made.
        number: of workers.

    Attributes:
        workers: the processes of those that run.
    """

    def __init__(self, folder, number=2):
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.number = number
        self.workers = []

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self):
        self.file.unlink(missing_ok=True)
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-jupyter")
        self._scheduler = self._start("dask_scheduler", *options, "--scheduler-file", self.file)
        wait_until(self.file.exists)
        for _ in range(self.number):
            self.start_worker()

    def kill(self):
        """End the scheduler and all workers."""
        _kill(self._scheduler)
        while self.workers:
            self.kill_worker(0)

    def kill_worker(self, number):
        _kill(self.workers.pop(number))

    @property
    def address(self):
        return json.loads(self.file.read_text())["address"]

    def start_worker(self, *before):
        """A worker of one thread, with no nanny that would start it again.

        Args:
            before: words of the command that are to start it.
        """
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "60")
        options += ("--local-directory", self.folder)
        self.workers.append(self._start("dask_worker", self.address, *options, before=before))

    def _start(self, module, *options, before=()):
        command = [*before, sys.executable, "-m", f"distributed.cli.{module}", *options]
        with open(self.folder / "log", "a") as log:
            return subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def _kill(process):
    """SIGKILL to a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
