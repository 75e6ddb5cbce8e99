"""A file of torch: exists whole or not at all, holds plain types alone, and damage is found."""

import argparse
import os
import pickle
import re
import zipfile
import zlib

import numpy as np
import torch

from fairseq_smoe.errors import CheckpointError
from fairseq_smoe.preparation.files import whole_file

# what torch's weights-only loader does not know of itself: fairseq writes its options as a
# Namespace, and numbers of numpy where a metric was computed with it
PLAIN_TYPES = (
    argparse.Namespace,
    np._core.multiarray.scalar,
    np._core.multiarray._reconstruct,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)),
)


def write(content, path):
    """Write a file that after a crash at any time is the old one, or all of the new one.

    Raises:
        DiskFullError: the old one, if any, is untouched.
    """
    with whole_file(path) as handle:
        torch.save(content, handle)
        handle.flush()
        os.fsync(handle.fileno())  # the name must not reach the disk before the content


def read(path, checked=True):
    """Read a file that torch.save has written.

    Tensors stay in the file until they are used, so that what is not used takes no memory. They
    are on the CPU.

    Args:
        checked: whether to compare checksums first, which reads all of it.

    Raises:
        CheckpointError: it is missing or damaged, or asks for types other than plain ones; nothing
            in the file is run.
    """
    if checked:
        check(path)
    try:
        with torch.serialization.safe_globals(list(PLAIN_TYPES)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path}: asks for {asked[1] if asked else 'something'}, which is no plain data; it was "
            "not loaded. Use a checkpoint that fairseq-train has written, from a source you trust"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(_unreadable(path, type(error).__name__)) from error


def check(path):
    """Find out whether a file is there and as it was written.

    Raises:
        CheckpointError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself compares no checksums
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise CheckpointError(_unreadable(path, error)) from error
    if damaged:
        raise CheckpointError(_unreadable(path, f"checksum of {damaged}"))


def _unreadable(path, reason):
    return (
        f"{path}: is damaged, or no checkpoint ({reason}); give another with --restore-file or "
        "--path. With --restore-fallback, fairseq-train takes the newest one that is whole"
    )
