"""A file of torch: exists whole or not at all, holds plain types alone, and damage is found."""

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

# what torch's weights-only loader does not know of itself: fairseq writes its options as a
# Namespace, and numbers of numpy where a metric was computed with it; under the name that numpy 2
# writes, and under that of numpy 1
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

_PICKLE = "data.pkl"  # the file in the archive that says what there is and where
_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_IS_FOLDER = 0x10


def write(content, path):
    """Write a file that after a crash at any time is the old one, or all of the new one.

    Raises:
        DiskFullError: the old one, if any, is untouched.
        OSError: so it is where the disk fails otherwise.
    """
    path = Path(path)
    remove_unfinished(path.parent, glob.escape(path.name))  # as large as a model
    with whole_file(path) as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            # torch complains that the file is not as long as it should be, whatever the reason
            reason = error.__context__
            if isinstance(reason, OSError):
                raise OSError(*reason.args) from error
            raise
        handle.flush()
        os.fsync(handle.fileno())  # the name must not reach the disk before the content


def read(path, checked=True):
    """Read a file that torch.save has written, of whatever version.

    Tensors stay in the file until they are used, so that what is not used takes no memory. They
    are on the CPU.

    Args:
        checked: whether to compare the checksums of the tensors first, which reads all of it.

    Raises:
        CheckpointError: it is missing or damaged, or asks for types other than plain ones; nothing
            in the file is run.
    """
    check(path, tensors=checked)
    try:
        with torch.serialization.safe_globals(list(PLAIN_TYPES)):
            # torch before 1.6 wrote no archives, which alone can be mapped
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # content that nobody has foreseen can raise whatever it likes
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
    """Find out whether a file is there and as it was written.

    Of what torch before 1.6 wrote, only whether it is there: it has no checksums.

    Args:
        tensors: whether to compare also their checksums.

    Raises:
        CheckpointError: it is not.
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
                if entry.external_attr & _IS_FOLDER:  # of which torch reads nothing
                    damaged = entry.filename
    except Exception as error:  # of any kind, where a length, a name or a flag is damaged
        raise _unreadable(path, error) from error
    if damaged:
        raise _unreadable(path, f"in {damaged}")


def is_of_torch(path):
    """Whether a file was written by torch.save, as far as one can tell: damaged ones are counted,
    other archives are not, nor what a killed process has begun to write.

    Raises:
        CheckpointError: it cannot be read.
    """
    if re.search(r"\.unfinished-\d+$", str(path)) or _start(path) != _ZIP_START:
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
    reason = " ".join(str(reason).split())  # may quote what the file holds, also ends of lines
    return CheckpointError(
        f"{path}: is damaged, or no checkpoint ({reason}); give another with --restore-file or "
        "--path. With --restore-fallback, fairseq-train takes the newest one that is whole"
    )
