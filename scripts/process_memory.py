"""The memory of processes, as Linux counts it."""

import os
import threading
from pathlib import Path


def memory_kib(pid="self"):
    """Memory of a process in KiB by the names of ``/proc/PID/status``: ``VmRSS`` all that is
    resident now, ``VmHWM`` the most of it so far, ``RssAnon`` without mapped files. {} if there is
    no such process, or it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) for name, value in fields}


def added_by(step):
    """MiB that a call of ``step`` adds to the memory of this process at most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is in use now
    before = memory_kib()["VmRSS"]
    step()
    return (memory_kib()["VmHWM"] - before) // 1024


class Peaks:
    """The most that the processes which this one has started need while a block of code runs.

    Args:
        folder: where they write.

    Attributes:
        own_mib, all_mib: memory of the largest process: without and with mapped files.
        disk_bytes: of the files in ``folder``, those that are removed again included.
    """

    def __init__(self, folder):
        self.folder = folder
        self.own_mib = self.all_mib = self.disk_bytes = 0
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=args, daemon=True)
            for args in ((self._see_memory, 0.2), (self._see_disk, 2))
        ]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        for thread in self._threads:
            thread.join()
        self._see_disk()

    def _watch(self, see, pause):
        while not self._done.wait(pause):
            see()

    def _see_memory(self):
        for pid in _descendants(os.getpid()):
            kib = memory_kib(pid)
            self.own_mib = max(self.own_mib, kib.get("RssAnon", 0) >> 10)
            self.all_mib = max(self.all_mib, kib.get("VmRSS", 0) >> 10)

    def _see_disk(self):
        self.disk_bytes = max(self.disk_bytes, size_of(self.folder))


def _descendants(pid):
    """The processes that one has started, and those that they have started."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = thread.read_text().split()
        except OSError:
            continue
        found += [*children, *(pid for child in children for pid in _descendants(child))]
    return found


def size_of(folder):
    """Bytes of all files in a folder, from which others may remove some meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            pass
    return total
