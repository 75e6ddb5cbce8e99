"""torch files: complete or absent, with plain types only, and checked for damage."""

import argparse
import glob
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy._core import multiarray

from fairseq_smoe.errors import CheckpointError
from fairseq_smoe.files import remove_unfinished, whole_file

# types that torch's weights-only loader does not allow by default: fairseq writes its options as a
# Namespace, and some metrics as numpy numbers, under the names of numpy 2 and of numpy 1
PLAIN_TYPES = (
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(
        (getattr(multiarray, name), f"numpy.{module}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for module in ("_core", "core")
    ),
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
)

_PICKLE = "data.pkl"  # the file in the archive that lists the contents and their places
_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_IS_FOLDER = 0x10


def write(content, path):
    """Write a file atomically: after a crash it is either the old file or the complete new one.

    Raises:
        DiskFullError: the old file, if any, is untouched.
        OSError: another error of the disk; the old file is untouched as well.
    """
    path = Path(path)
    remove_unfinished(path.parent, glob.escape(path.name))  # as large as a model
    with whole_file(path) as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            # whatever the reason, torch only says that the file is too short
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(*reason.args) from error
            raise
        handle.flush()
        os.fsync(handle.fileno())  # the name must not reach the disk before the content


def read(path, checked=True):
    """Read a file that any version of torch.save has written.

    Tensors are on the CPU and mapped from the file, so tensors that are not used take no memory.

    Args:
        checked: whether to compare the checksums of the tensors first, which reads the whole file.

    Raises:
        CheckpointError: the file is missing or damaged, or asks for types other than plain ones. No
            code in the file is executed.
    """
    check(path, tensors=checked)
    try:
        with torch.serialization.safe_globals(list(PLAIN_TYPES)):
            # torch before 1.6 wrote no archives, and only archives can be mapped
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged content can raise any exception
        if not isinstance(error, pickle.UnpicklingError):
            raise _unreadable(path, f"{type(error).__name__}: {str(error)[:100]}") from error
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not asked:
            raise _unreadable(path, "no plain data") from error
        raise CheckpointError(
            f"{path}: asks for {asked[1]}, which is no plain data; it was not loaded. Use a "
            "checkpoint that fairseq-train has written, from a source you trust"
        ) from error


def check(path, tensors=True):
    """Check that a file exists and is undamaged.

    Files of torch before 1.6 have no checksums; of those, check only that they exist.

    Args:
        tensors: whether to compare the checksums of the tensors, too.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    start = _start(path)
    if start.startswith(_PICKLE_START):
        return
    if start != _ZIP_START:
        raise _unreadable(path, f"it does not begin like one, but with {start!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in _pickles(archive):
                archive.read(name)
            damaged = archive.testzip() if tensors else None  # torch compares no checksums
            for entry in archive.infolist():
                if entry.external_attr & _IS_FOLDER:  # torch does not read these
                    damaged = entry.filename
    except Exception as error:  # any exception is possible if a length, a name or a flag is damaged
        raise _unreadable(path, error) from error
    if damaged:
        raise _unreadable(path, f"in {damaged}")


def is_of_torch(path):
    """Whether a file seems to be written by torch.save. A damaged one counts; other archives and
    files that a killed process left incomplete do not.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if re.search(r"\.unfinished-[\d-]+$", str(path)) or _start(path) != _ZIP_START:
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(_pickles(archive))
    except Exception:  # as in check
        return True


def _pickles(archive):
    return [name for name in archive.namelist() if name.endswith(f"/{_PICKLE}")]


def _start(path):
    try:
        with open(path, "rb") as handle:
            return handle.read(len(_ZIP_START))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _unreadable(path, reason):
    reason = " ".join(str(reason).split())  # may quote the file's content, with line ends
    return CheckpointError(
        f"{path}: is damaged, or no checkpoint ({reason}); give another with --restore-file or "
        "--path. With --restore-fallback, fairseq-train takes the newest one that is whole"
    )
