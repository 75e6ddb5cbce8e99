"""The memory of processes, as Linux counts it."""

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
