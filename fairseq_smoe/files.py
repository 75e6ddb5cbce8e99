"""Files and folders that are either complete or absent."""

import errno
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from fairseq_smoe.errors import DiskFullError, OptionError


def unfinished(path, pid):
    """The name of a file while a process of this machine is writing it. It is of this process
    alone: an orphan of a killed run may still be writing the same file, or a worker of a cluster
    that was taken for lost."""
    path, machine = Path(path), crc32(platform.node().encode())
    return path.with_name(f"{path.name}.unfinished-{pid}-{machine}")


@contextmanager
def whole_file(path, mode="wb", **options):
    """``open(path, mode)`` for writing; the file gets its name only when all of it is written.

    Raises:
        DiskFullError: the incomplete file is removed.
    """
    path = Path(path)
    part = unfinished(path, os.getpid())
    try:
        with disk_space_for(path):
            with open(part, mode, **options) as handle:
                yield handle
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def disk_space_for(path):
    """Turn the error of a full disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{path}: the disk is full; free some space and run the same command again, which "
            "goes on from what is complete"
        ) from error


def write_whole(path, text):
    """Write a text file that is either complete or absent."""
    with whole_file(path, "w", encoding="utf-8") as handle:
        handle.write(text)


def require_new_folder(target, flag="--to"):
    """Check that a folder can be made.

    Raises:
        OptionError: there is something of that name. An empty folder is fine.
    """
    target = Path(target)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise OptionError(f"{flag} {target}: exists; give a new folder, or remove it")


@contextmanager
def whole_folder(target):
    """A folder to write into. It gets the name ``target`` only when the block has ended without an
    error; after one it is removed.

    Raises:
        OptionError: there is something of that name. An empty folder is replaced.
    """
    require_new_folder(target)
    target = Path(target)
    part = target.with_name(f"{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with disk_space_for(target):
            yield part
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_unfinished(folder, pattern="*"):
    """Remove what a killed process had begun to write with :func:`whole_file`."""
    for part in folder.glob(f"{pattern}.unfinished-[0-9]*"):
        part.unlink(missing_ok=True)


@contextmanager
def only_process_in(folder):
    """Lock ``folder`` for this process. The kernel releases the lock however the process ends.

    Raises:
        OptionError: another process holds it.
    """
    import fcntl  # not on Windows, where the rest of this module works

    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"--to {folder}: another process prepares data there; wait for it or stop it"
            ) from error
        except OSError:
            pass  # not every network file system has locks
        yield


def read_lines(path, remedy):
    """The lines of a text file; only newlines end a line, not Unicode's other separators.

    Args:
        remedy: last words of an error's message: what to do.

    Raises:
        OptionError: it is missing, or no UTF-8 text.
    """
    try:
        lines = Path(path).read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise OptionError(f"{path}: no such file; {remedy}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise OptionError(
            f"{path}, line {line}: is no UTF-8 text ({error.reason}); {remedy}"
        ) from None
    return lines[:-1] if lines[-1] == "" else lines
