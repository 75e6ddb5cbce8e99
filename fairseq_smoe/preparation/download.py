"""Downloading files in parallel; interrupted ones are resumed, and files are complete or absent."""

import fcntl
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import disk_space_for
from fairseq_smoe.preparation.transfer import empty, receive, size_of, version_file

GRACE = 2.0  # seconds for the other downloads to stop after a failure


@dataclass(frozen=True)
class Download:
    url: str
    path: Path  # final name; path + ".part" while incomplete
    size: int | None = None  # bytes, where published
    sha256: str | None = None
    # called with the path of the complete part; returns what is wrong with it, or None
    check: Callable[[Path], str | None] | None = None
    remedy: str = "give another address with --base-url, or files you have with --from"


def download_all(downloads, connections=4, retries=5):
    """Fetch the files that do not exist yet, ``connections`` at a time.

    Only complete, verified files get their final names. Parts that an earlier call left are
    resumed. A download fails after ``retries`` failures in a row without a new byte.

    Raises:
        OptionError: a file cannot be downloaded, is not what was published, or the disk is full.
            The other downloads are stopped, and their parts kept.
    """
    missing = {each.path: each for each in downloads if not each.path.exists()}
    if not missing:
        return
    jobs = queue.SimpleQueue()
    for download in missing.values():
        jobs.put(download)
    with tqdm(total=0, unit="B", unit_scale=True, desc="download") as bar:
        batch = _Batch(bar, retries)
        # daemons: a stalled connection must not hold up Ctrl-C
        threads = [
            threading.Thread(target=_work, args=(jobs, batch), daemon=True)
            for _ in range(min(connections, len(missing)))
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and not batch.stopped.is_set():
                batch.stopped.wait(0.1)
        finally:
            batch.stopped.set()
            deadline = time.monotonic() + GRACE
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
    if batch.errors:
        raise batch.errors[0]


class _Batch:
    """The state that the downloads of one call share."""

    def __init__(self, bar, retries):
        self.retries = retries
        self.stopped = threading.Event()
        self.errors = []
        self._bar = bar
        self._totals = {}  # bytes
        self._lock = threading.Lock()

    def expect(self, download, total):
        with self._lock:
            self._totals[download.path] = total
            self._bar.total = sum(self._totals.values())
            self._bar.refresh()

    def advance(self, count):
        with self._lock:
            self._bar.update(count)
        self._go_on()

    def sleep(self, seconds, reason):
        with self._lock:
            self._bar.set_postfix_str(f"{reason}; next try in {seconds:.0f} s")
        self.stopped.wait(seconds)
        with self._lock:
            self._bar.set_postfix_str("")
        self._go_on()

    def _go_on(self):
        if self.stopped.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Another download has failed, or the user has interrupted."""


def _work(jobs, batch):
    try:
        while not batch.stopped.is_set():
            _fetch(jobs.get_nowait(), batch)
    except (queue.Empty, _Stopped):
        pass
    except BaseException as error:  # for the main thread
        batch.errors.append(error)
        batch.stopped.set()


def _fetch(download, batch):
    download.path.parent.mkdir(parents=True, exist_ok=True)
    with disk_space_for(download.path), _locked_part(download) as part:
        if part is None:
            return
        if download.size is not None:
            batch.expect(download, download.size)
        batch.advance(size_of(part))
        for _ in range(2):
            receive(download, part, batch)
            problem = _problem(download, part)
            if problem is None:
                os.fsync(part.fileno())
                os.replace(part.name, download.path)
                version_file(download).unlink(missing_ok=True)
                return
            empty(part, batch)
        version_file(download).unlink(missing_ok=True)
        raise OptionError(
            f"{download.path}: {problem}, as fetched twice from {download.url}; " + download.remedy
        )


@contextmanager
def _locked_part(download):
    """The open ``.part``, for this process alone; None if another one has finished meanwhile."""
    path = download.path.with_name(download.path.name + ".part")
    with open(path, "a+b", buffering=0) as part:
        locked = _lock(part)
        # another process may have renamed or removed the part before this one got the lock
        ours = path.exists() and os.path.samestat(path.stat(), os.fstat(part.fileno()))
        if locked and download.path.exists():
            if ours:
                path.unlink()
            yield None
        elif locked and ours:
            try:
                yield part
            finally:
                if size_of(part) == 0:
                    path.unlink(missing_ok=True)
        else:
            raise OptionError(
                f"{download.path}: another process is downloading it; wait for that one or end it"
            )


def _lock(handle):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # not every network file system has locks
    return True


def _problem(download, part):
    """What is wrong with a complete file, in words; None if nothing is."""
    if download.size not in (None, size_of(part)):
        return f"expected {download.size} bytes, found {size_of(part)}"
    if download.sha256 is not None:
        part.seek(0)
        found = hashlib.file_digest(part, "sha256").hexdigest()
        if found != download.sha256:
            return f"expected SHA-256 {download.sha256}, found {found}"
    return download.check(Path(part.name)) if download.check else None
