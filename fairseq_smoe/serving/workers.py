"""Processes that translate, each driven by a thread that starts it again when it dies."""

import logging
import multiprocessing
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass

from fairseq_smoe.errors import OptionError

logger = logging.getLogger(__name__)

START_TIMEOUT = 600  # seconds for which a model may load
PATIENCE = 10  # seconds for which a process may end by itself
PAUSE = 1.0  # seconds before a worker that died at once is started again


@dataclass(frozen=True)
class ModelFacts:
    """What a process tells of the model that it has loaded.

    Attributes:
        languages, directions: see :class:`~fairseq_smoe.inference.translator.Translator`.
        spm: path of the SentencePiece model.
    """

    languages: list
    directions: list
    spm: str


class WorkerDied(Exception):
    """The process that translated a job has ended."""


class Workers:
    """Processes that take jobs from a queue.

    Args:
        queue: :class:`~fairseq_smoe.serving.jobs.JobQueue`
        load: arguments of ``Translator.load``, a dict.
        options: arguments of ``Translator.translate`` for all jobs, a dict.
        number: of processes.

    Attributes:
        counts: of "batches", "sentences", "failures" (batches) and "restarts".
    """

    def __init__(self, queue, load, options, number):
        self._queue, self._load, self._options = queue, load, options
        self._stopping = False
        self.counts = Counter()
        self._alive = [False] * number
        self._ready = [threading.Event() for _ in range(number)]
        self._failed = self._facts = None
        self._threads = [
            threading.Thread(target=self._drive, args=(i,), name=f"worker-{i}", daemon=True)
            for i in range(number)
        ]

    def start(self):
        """Start all processes, and wait until each has loaded the model.

        Returns:
            :class:`ModelFacts`

        Raises:
            OptionError: the model cannot be loaded.
        """
        for thread in self._threads:
            thread.start()
        for ready in self._ready:
            if not ready.wait(START_TIMEOUT):
                self._failed = f"the model was not loaded within {START_TIMEOUT} seconds"
        if self._failed:
            self._stopping = True
            raise OptionError(self._failed)
        return self._facts

    @property
    def alive(self):
        """Number of processes that are ready to translate."""
        return sum(self._alive)

    def stop(self):
        """Let every process finish what the queue, which is closed, still has; then end them."""
        self._stopping = True
        for thread in self._threads:
            thread.join()

    def _drive(self, number):
        while not self._stopping:
            process, connection = self._start_process()
            try:
                if not self._is_ready(connection):
                    time.sleep(PAUSE)
                    continue
                self._alive[number] = True
                self._ready[number].set()
                if self._serve(connection):
                    return
                self.counts["restarts"] += 1
                logger.warning("a process that translates has died; another one is started")
            finally:
                self._alive[number] = False
                self._ready[number].set()
                connection.close()  # it ends by itself
                process.join(PATIENCE)
                process.kill()
                process.join()

    def _start_process(self):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, self._load, self._options), daemon=True
        )
        process.start()
        theirs.close()  # so that the connection ends when the process dies
        return process, ours

    def _is_ready(self, connection):
        try:
            found = connection.recv()
        except EOFError:
            found = "the process that loads the model has died; is there enough memory?"
        if isinstance(found, ModelFacts):
            self._facts = found
            return True
        logger.error(found)
        self._failed = self._failed or found
        return False

    def _serve(self, connection):
        """Pass batches on. Returns True when the queue is closed and empty, False when the process
        has died."""
        while (batch := self._queue.take()) is not None:
            if not batch:
                continue
            try:
                connection.send([job.sentence for job in batch])
                answers = connection.recv()
            except (EOFError, OSError):
                self.counts["failures"] += 1
                for job in batch:
                    job.future.set_exception(WorkerDied())
                return False
            self.counts["batches"] += 1
            self.counts["sentences"] += len(batch)
            for job, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    job.future.set_exception(answer)
                else:
                    job.future.set_result(answer)
        return True


def _work(connection, load, options):
    """The loop of a process, until its connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends this process
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        from fairseq_smoe import Translator

        translator = Translator.load(**load)
    except OptionError as error:
        connection.send(str(error))
        return
    connection.send(ModelFacts(translator.languages, translator.directions, str(translator.spm)))
    while True:
        try:
            sentences = connection.recv()
        except EOFError:
            return
        connection.send(_answers(translator, sentences, options))


def _answers(translator, sentences, options):
    """A translation of every sentence, or the exception that it has caused."""
    answers = [None] * len(sentences)
    groups = {}
    for i, sentence in enumerate(sentences):
        groups.setdefault((sentence.n_best, sentence.with_capacity), []).append(i)
    for (n_best, with_capacity), group in groups.items():
        try:
            found = translator.translate(
                [sentences[i].text for i in group],
                [sentences[i].source for i in group],
                [sentences[i].target for i in group],
                n_best=n_best,
                with_capacity=with_capacity,
                **{**options, "beam": max(options["beam"], n_best)},
            )
        except Exception as error:  # an answer for everyone in the batch, whatever it was
            logger.exception("a batch could not be translated")
            found = [RuntimeError(type(error).__name__)] * len(group)
        for i, answer in zip(group, found):
            answers[i] = answer
    return answers
