"""A Dask cluster of real processes, which talk over TCP."""

import json
import os
import signal
import subprocess
import sys
import time

import toy_task

SECONDS = 60  # until a process answers


class DaskProcesses:
    """A scheduler and its workers, as ``dask scheduler`` and ``dask worker`` start them.

    Args:
        folder: for their files.
    """

    def __init__(self, folder):
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.processes = []

    def __enter__(self):
        self.start_scheduler()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            self.end(process)

    def start_scheduler(self):
        self.file.unlink(missing_ok=True)
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-jupyter")
        self.scheduler = self._start("dask_scheduler", *options, "--scheduler-file", self.file)
        wait_until(self.file.exists)

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
        return self._start("dask_worker", self.address, *options, before=before)

    def _start(self, module, *options, before=()):
        command = [*before, sys.executable, "-m", f"distributed.cli.{module}", *options]
        with open(self.folder / "log", "a") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env={**toy_task.environment(), "PYTHONPATH": str(toy_task.REPOSITORY)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    @staticmethod
    def end(process):
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
