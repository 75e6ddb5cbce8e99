"""Processes that translate in parallel, each one direction at a time."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import wait

from fairseq_smoe.errors import OneLineError


class WorkerError(OneLineError):
    """A worker failed or died."""


def translate_in_turn(translator, jobs, progress):
    """``(job, Translation)`` of every job, one after another, in this process.

    Args:
        translator: :class:`~fairseq_smoe.evaluation.translator.Translator`
        jobs: ``(direction, subset)``
        progress: see ``Translator.translate``.
    """
    for direction, subset in jobs:
        yield (direction, subset), translator.translate(direction, subset, progress)


def translate_side_by_side(make_translators, jobs, progress, start_method):
    """Yield ``(job, Translation)`` of every job when it is done. Each of ``make_translators`` runs
    in a process of its own.

    Args:
        make_translators: called without arguments, each in a process of its own.
        jobs, progress: as for :func:`translate_in_turn`.
        start_method: ``"fork"`` shares what this process has loaded; CUDA needs ``"spawn"``.

    Raises:
        WorkerError: a worker met an error, or died.
    """
    waiting = list(reversed(jobs))
    workers = _start(make_translators[: len(jobs)], multiprocessing.get_context(start_method))
    busy = {}  # connection -> job
    try:
        for connection in workers:
            _give_job(connection, waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                job = busy[connection]
                try:
                    kind, content = connection.recv()
                except EOFError:
                    raise WorkerError(_explain_death(workers[connection], job)) from None
                if kind == "progress":
                    progress(content)
                elif kind == "error":
                    raise WorkerError(content)
                else:
                    del busy[connection]
                    _give_job(connection, waiting, busy)
                    yield job, content
    finally:
        for process in workers.values():
            process.kill()
        for process in workers.values():
            process.join()


def _start(make_translators, context):
    """``{connection: process}``"""
    workers = {}
    # Ctrl-C reaches every process of the terminal; the workers leave it to this one, which ends
    # them. A spawned one ignores it from its first moment, because that is inherited.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for make_translator in make_translators:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, make_translator, os.getpid(), [*workers, ours])
                if context.get_start_method() == "fork"
                else (theirs, make_translator, os.getpid(), []),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that the connection ends when the worker dies
            workers[ours] = process
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, before)
    return workers


def _give_job(connection, waiting, busy):
    if waiting:
        busy[connection] = waiting.pop()
        try:
            connection.send(busy[connection])
        except OSError:
            pass  # the worker has died; receiving raises the error


def _explain_death(process, job):
    process.join()
    code = process.exitcode
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return (
        f"the worker for {job[0]} ({job[1]}) {how}; if memory was short, lower --max-tokens or "
        "--processes; the same command again goes on from the directions that are done"
    )


def _serve(connection, make_translator, parent, not_ours):
    """The loop of a worker, until its process is ended."""
    for other in not_ours:
        other.close()  # inherited by a fork
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        translator = make_translator()
        while True:
            direction, subset = connection.recv()
            result = translator.translate(
                direction, subset, lambda number: connection.send(("progress", number))
            )
            connection.send(("done", result))
    except EOFError:
        pass
    except OneLineError as error:
        connection.send(("error", str(error)))
    except Exception as error:
        traceback.print_exc()
        connection.send(("error", f"a worker failed: {type(error).__name__}: {error}"))


def _end_with(parent):
    """End this process when its parent is killed."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
