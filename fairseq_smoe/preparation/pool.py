"""Running jobs in parallel processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from tqdm import tqdm

from fairseq_smoe.errors import OptionError


def available_cores():
    """Number of cores that this process may use, if the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Pool:
    """What runs jobs.

    Attributes:
        parts: what was run so far: ``[{"part": title, "unit": of a job, "jobs": their number,
            "seconds": of all together}, ...]``
    """

    def __init__(self):
        self.parts = []

    @contextmanager
    def _part(self, title, unit, jobs, hide=False):
        """A progress bar for some jobs, which are noted among the parts at the end."""
        begun = time.monotonic()
        with tqdm(total=jobs, desc=title, unit=unit, mininterval=0.5, disable=hide) as bar:
            yield bar
        seconds = round(time.monotonic() - begun, 2)
        self.parts.append({"part": title, "unit": unit, "jobs": jobs, "seconds": seconds})


class ProcessPool(Pool):
    """Processes of this machine.

    Args:
        workers: number of processes; 1 for this process alone.
    """

    def __init__(self, workers):
        super().__init__()
        self.workers = workers

    def map(self, function, jobs, title, unit):
        """``[function(*job) for job in jobs]``, computed in parallel.

        ``function`` and jobs are pickled, so the function has to be at the top level of a module.
        Give the longest jobs first.

        Raises:
            OptionError: ``function`` raised it, or a process was killed, e.g. for lack of memory.
        """
        jobs = list(jobs)
        if self.workers == 1 or len(jobs) < 2:
            with self._part(title, unit, len(jobs)) as bar:
                return [_counted(function, job, bar) for job in jobs]
        with (
            self._part(title, unit, len(jobs)) as bar,
            _processes(min(self.workers, len(jobs))) as processes,
        ):
            try:
                return collect([processes.submit(function, *job) for job in jobs], bar)
            except BrokenProcessPool as error:
                raise OptionError(
                    f"--workers {self.workers}: a process was killed while it was at work on "
                    f"{title!r}, probably for lack of memory; use fewer workers and run the same "
                    "command again"
                ) from error
            finally:
                processes.shutdown(wait=False, cancel_futures=True)

    def run(self, function, *arguments):
        """``function(*arguments)`` in a child process, so that Ctrl-C ends code that ignores it."""
        with self._part(function.__name__, "call", 1, hide=True), _processes(1) as processes:
            return processes.submit(function, *arguments).result()


def collect(futures, bar):
    """The results of futures in their order, with a progress bar."""
    for future in as_completed(futures):
        future.result()
        bar.update()
    return [future.result() for future in futures]


def _processes(workers):
    return ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_quietly_with_parent,
        initargs=(os.getpid(),),
    )


def _counted(function, job, bar):
    result = function(*job)
    bar.update()
    return result


def _end_quietly_with_parent(parent):
    """End a worker quietly with its parent. Otherwise workers would wait for work forever when the
    parent is killed, and each would print a traceback on Ctrl-C, which all of them receive."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
