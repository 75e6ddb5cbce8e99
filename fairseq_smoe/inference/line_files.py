"""Translating text line by line, files of any length in constant memory."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.workers import WorkerError
from fairseq_smoe.files import disk_space_for, write_whole

INVALID_UTF8 = ("error", "replace")
FORMATS = ("text", "jsonl")
AHEAD = 2  # chunks that wait for each process
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Job:
    """What to translate, and how.

    Attributes:
        source, target: languages.
        options: of :meth:`~fairseq_smoe.inference.translator.Translator.translate`.
        form: "text" or "jsonl".
        invalid_utf8: "error" or "replace".
        chunk: lines that are translated at a time.
    """

    source: str
    target: str
    options: dict
    form: str = "text"
    invalid_utf8: str = "error"
    chunk: int = 2000


def translate_lines(make_translator, job, source, target, processes=1):
    """Translate each line of a file. Line N of the output is line N of the input.

    Args:
        make_translator: returns the :class:`~fairseq_smoe.inference.translator.Translator`.
        source: path, or None for standard input.
        target: path, or None for standard output. It gets its name when all is translated. A
            command that was stopped goes on from ``TARGET.part``.
        processes: each translates chunks of its own.

    Raises:
        OptionError: a file is missing, in the way, or no UTF-8 text.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_input(source))
        size = None if source is None else os.fstat(file.fileno()).st_size
        output = stack.enter_context(Output.open(target, source, job, size))
        bar = stack.enter_context(
            tqdm(total=size, desc="translate", unit="B", unit_scale=True, file=sys.stderr)
        )
        lines = Lines(file, source or "standard input", job.invalid_utf8)
        output.skip_done(lines)
        bar.update(lines.bytes_read)
        run = stack.enter_context(_runner(make_translator, job, processes))
        before = lines.bytes_read
        for written, bytes_read in _in_order(run, lines.chunks(job.chunk), processes * AHEAD):
            output.write(written)
            bar.update(bytes_read - before)
            before = bytes_read
        output.finish()


class BadLineError(OptionError):
    """A line is no UTF-8 text: names file and line."""


class Lines:
    """The lines of a file, without line ends and byte order mark.

    Attributes:
        number, bytes_read: lines and bytes so far.
    """

    def __init__(self, file, name, invalid_utf8):
        self._file, self._name, self._invalid = file, name, invalid_utf8
        self.number = self.bytes_read = 0

    def __iter__(self):
        return self

    def __next__(self):
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        self.bytes_read += len(line)
        if self.number == 1:
            line = line.removeprefix(_BOM)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        try:
            return line.decode("utf-8", "replace" if self._invalid == "replace" else "strict")
        except UnicodeDecodeError as error:
            raise BadLineError(
                f"{self._name}, line {self.number}: is no UTF-8 text ({error.reason}); repair it, "
                "or give --invalid-utf8 replace"
            ) from None

    def chunks(self, size):
        """``(lines, bytes read so far)``, ``size`` lines at a time."""
        while chunk := list(islice(self, size)):
            yield chunk, self.bytes_read


@contextmanager
def open_input(path):
    """The file, or standard input for None.

    Raises:
        OptionError: it cannot be read.
    """
    if path is None:
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")
    except OSError as error:
        raise OptionError(f"--input {path}: {error.strerror}; give a text file") from error
    with file:
        yield file


class Output:
    """Translated lines, written to PATH.part until all are there.

    Attributes:
        done: number of lines that an earlier command has written.
    """

    def __init__(self, file, path=None):
        self._file, self._path, self.done = file, path, 0

    @property
    def part(self):
        return Path(f"{self._path}.part")

    @property
    def parts(self):
        """Folder of what ranks have translated of the lines behind those in the part."""
        return Path(f"{self._path}.parts")

    @property
    def facts(self):
        """What the lines in the part were made from."""
        return Path(f"{self._path}.part.json")

    @classmethod
    @contextmanager
    def open(cls, path, source, job, size):
        if path is None:
            yield cls(sys.stdout.buffer)
            return
        output = cls(None, Path(path))
        if output._path.exists():
            raise OptionError(f"--output {path}: exists; give another name, or remove it")
        wanted = None if source is None else fingerprint(source, job, size)
        try:
            known = json.loads(output.facts.read_text())
        except (FileNotFoundError, ValueError):
            known = None
        goes_on = known is not None and known == wanted and output.part.exists()
        try:
            if not goes_on:
                shutil.rmtree(output.parts, ignore_errors=True)
                output.part.write_bytes(b"")
                write_whole(output.facts, json.dumps(wanted))
            output._file = open(output.part, "r+b")
        except OSError as error:
            raise OptionError(f"--output {path}: {error.strerror}; give another place") from error
        with output._file:
            output._find_end()
            if output.done:
                print(f"goes on behind line {output.done:,} of {output.part}", file=sys.stderr)
            yield output

    def skip_done(self, lines):
        """Skip the :class:`Lines` that are done.

        Raises:
            OptionError: there are fewer.
        """
        for _ in islice(lines, self.done):
            pass
        if lines.number < self.done:
            raise OptionError(
                f"{self.part}: has more lines than the input; remove it to start anew"
            )

    def _find_end(self):
        """Go behind the last whole line."""
        end = position = 0
        while block := self._file.read(1 << 20):
            self.done += block.count(b"\n")
            last = block.rfind(b"\n")
            if last >= 0:
                end = position + last + 1
            position += len(block)
        self._file.seek(end)
        self._file.truncate()

    def write(self, lines):
        self.append("".join(f"{line}\n" for line in lines).encode())

    def append(self, content):
        """Write bytes, whole lines."""
        with disk_space_for(self._path or "standard output"):
            self._file.write(content)
            self._file.flush()

    def finish(self):
        if self._path is not None:
            os.fsync(self._file.fileno())
            os.replace(self.part, self._path)
            self.facts.unlink()
            shutil.rmtree(self.parts, ignore_errors=True)


def fingerprint(source, job, size):
    """What has to be the same for a command to go on with another's output."""
    with open(source, "rb") as file:
        start = hashlib.sha256(file.read(1 << 20)).hexdigest()
    # the number of lines and tokens translated at a time changes no translation
    options = {name: value for name, value in job.options.items() if name != "max_tokens"}
    rest = [job.source, job.target, options, job.form, job.invalid_utf8]
    return json.loads(json.dumps({"size": size, "start": start, "job": rest}))


_translator = None  # of a worker process


@contextmanager
def _runner(make_translator, job, processes):
    """``run(lines)`` returns a future of output lines."""
    translator = make_translator()
    if processes == 1:

        def run(lines):
            future = Future()
            future.set_result(translate_block(translator, job, lines))
            return future

        yield run
        return

    def start():
        global _translator
        _translator = translator

    context = multiprocessing.get_context("fork")  # shares the model's memory
    with ProcessPoolExecutor(processes, context, start) as pool:
        try:
            yield lambda lines: pool.submit(_translate_in_worker, job, lines)
        except BrokenProcessPool:
            raise WorkerError(
                "a process that translates has died; if memory was short, lower --max-tokens or "
                "--processes; the same command goes on from what is written"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _translate_in_worker(job, lines):
    return translate_block(_translator, job, lines)


def translate_block(translator, job, lines):
    """The lines of the output for some of the input."""
    found = translator.translate(lines, job.source, job.target, **job.options)
    return [_line(job, text, translated) for text, translated in zip(lines, found, strict=True)]


def _line(job, text, translated):
    scores = job.options.get("with_scores")
    if job.form == "text":
        fields = []
        for hypothesis in translated.hypotheses:
            fields += [hypothesis.text, *([f"{hypothesis.score:.4f}"] if scores else [])]
        return "\t".join(fields)
    facts = {
        "source": text,
        "translations": [
            {"text": h.text, **({"score": round(h.score, 4)} if scores else {})}
            for h in translated.hypotheses
        ],
    }
    return json.dumps(facts, ensure_ascii=False)


def _in_order(run, chunks, ahead):
    """``(output lines, bytes read)`` of each chunk in order; ``ahead`` are being translated. If a
    chunk cannot be read, those before it come first."""
    waiting, error = deque(), None
    while True:
        try:
            chunk = next(chunks, None)
        except OptionError as caught:
            chunk, error = None, caught
        if chunk is None:
            break
        waiting.append((run(chunk[0]), chunk[1]))
        if len(waiting) > ahead:
            yield _done(waiting)
    while waiting:
        yield _done(waiting)
    if error:
        raise error


def _done(waiting):
    future, bytes_read = waiting.popleft()
    return future.result(), bytes_read
