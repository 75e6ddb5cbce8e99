"""Work spread over processes, with a progress bar."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from fairseq_smoe.errors import OptionError


def available_cores():
    """As many as this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def in_child(function, *arguments):
    """``function(*arguments)`` in a process of its own: Ctrl-C ends even what does not listen."""
    with _pool(1) as pool:
        return pool.submit(function, *arguments).result()


def in_parallel(function, jobs, workers, title, unit):
    """``[function(*job) for job in jobs]``, in any order of work, results in the order of jobs.

    ``function`` and jobs are pickled, so the function is one of a module. Give the longest jobs
    first.

    Raises:
        OptionError: as ``function`` does, or a process was killed, as for lack of memory.
    """
    jobs = list(jobs)
    bar = tqdm(total=len(jobs), desc=title, unit=unit, mininterval=0.5)
    if workers == 1 or len(jobs) < 2:
        with bar:
            return [_counted(function, job, bar) for job in jobs]
    with bar, _pool(min(workers, len(jobs))) as pool:
        try:
            futures = [pool.submit(function, *job) for job in jobs]
            for future in as_completed(futures):
                future.result()
                bar.update()
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise OptionError(
                f"--workers {workers}: a process was killed while it was at work on {title!r}, "
                "probably for lack of memory; use fewer workers and run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(workers):
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
    """Processes of a pool wait for work forever when their parent is killed, and print a traceback
    each on Ctrl-C, which all processes of a terminal receive."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
