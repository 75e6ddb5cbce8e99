"""Sentences that wait for a worker, and those that it translates together."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sentence:
    """What a worker needs to know of a job.

    Attributes:
        text: one line.
        source, target: languages of the model.
        n_best: translations to return.
        with_capacity: whether to return the passes of the tokens.
    """

    text: str
    source: str
    target: str
    n_best: int = 1
    with_capacity: bool = False


@dataclass
class Job:
    """A sentence that someone waits for.

    Attributes:
        tokens: of the source, to fill batches.
        future: gets a :class:`~fairseq_smoe.inference.results.Translated`, or an exception. A job
            whose future is cancelled is not translated.
        deadline: ``time.monotonic()`` after which nobody waits any more.
    """

    sentence: Sentence
    tokens: int
    deadline: float
    future: Future = field(default_factory=Future)


class QueueFull(Exception):
    """There is no room for more jobs."""


class JobQueue:
    """Jobs in the order of their arrival.

    Args:
        limit: most tokens that wait.
        batch_tokens: most tokens that are translated together; a longer sentence is alone.
        wait: seconds for which an idle worker waits for more jobs after the first.
    """

    def __init__(self, limit, batch_tokens, wait):
        self._limit, self._batch_tokens, self._wait = limit, batch_tokens, wait
        self._jobs, self._tokens = deque(), 0
        self._changed = threading.Condition()
        self._closed = False

    @property
    def tokens(self):
        """Tokens that wait."""
        return self._tokens

    def put(self, jobs):
        """Add jobs, all or none.

        Raises:
            QueueFull: too many tokens would wait, or the server is being stopped.
        """
        tokens = sum(job.tokens for job in jobs)
        with self._changed:
            # a request that is larger than the limit is taken if nothing waits
            if self._closed or (self._tokens and self._tokens + tokens > self._limit):
                raise QueueFull
            self._jobs.extend(jobs)
            self._tokens += tokens
            self._changed.notify()

    def take(self):
        """Wait for jobs; then those to be translated next. None when the queue is closed and empty.
        Jobs that nobody waits for are left out."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            end = time.monotonic() + self._wait
            while self._tokens < self._batch_tokens and not self._closed:
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            batch, taken = [], 0
            while self._jobs and (not batch or taken + self._jobs[0].tokens <= self._batch_tokens):
                job = self._jobs.popleft()
                self._tokens -= job.tokens
                if job.deadline > time.monotonic() and job.future.set_running_or_notify_cancel():
                    batch.append(job)
                    taken += job.tokens
                elif not job.future.cancelled():
                    job.future.set_exception(TimeoutError())
            if self._jobs:
                self._changed.notify()  # for another worker
            return batch

    def close(self):
        """Take no more jobs. Those that wait are still translated."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
