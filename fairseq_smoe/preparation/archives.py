"""Reading archives once from front to back. Damaged and malicious ones give a one-line error."""

import bz2
import errno
import gzip
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from tqdm import tqdm

from fairseq_smoe.errors import OptionError

SUFFIXES = ".tar, .tar.gz, .tgz, .tar.xz, .tar.bz2, .zip"
CHUNK = 1 << 20  # bytes

_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # the second one is empty
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
# what the readers raise at names and numbers that make no sense
_SENSELESS = (ValueError, OverflowError, struct.error, RuntimeError)


class DamagedArchive(OptionError):
    """An archive is damaged or malicious; nothing from it can be used."""


@dataclass(frozen=True)
class Member:
    path: str  # as in the archive: never use it as the name of a file
    is_folder: bool
    is_file: bool  # a plain file: no folder, link or device
    open: Callable  # the bytes, to be read before the next member is visited


def is_archive(path):
    """Whether a file is an archive, by its content, because names may be wrong."""
    with open(path, "rb") as handle:
        start = handle.read(512)
    return start.startswith((*_COMPRESSIONS, *_ZIP_STARTS)) or start[257:262] == b"ustar"


def problem_with(path):
    """Read a whole archive, and say what is wrong with it; None if it is undamaged."""
    if not is_archive(path):
        return f"expected an archive ({SUFFIXES}), found something else"
    try:
        visit_members(path, f"test {path.name}", _read_through)
    except DamagedArchive as error:
        return str(error)
    return None


def visit_members(path, description, visit):
    """Call ``visit(member)`` for every :class:`Member`, then check the end of the archive.

    Raises:
        DamagedArchive: names the archive, and the member if that is damaged.
    """

    def check_and_visit(member):
        parts = re.split(r"[/\\]", member.path)
        if parts[0] == "" or parts[0].endswith(":") or ".." in parts:
            refuse(path, f"has a member {member.path!r}, outside of any folder to unpack to")
        visit(member)

    with open(path, "rb") as raw, _one_line_if_damaged(path):
        start = raw.read(6)
        raw.seek(0)
        total = path.stat().st_size
        with tqdm.wrapattr(raw, "read", total=total, desc=description, delay=2) as counted:
            if start.startswith(_ZIP_STARTS):
                _visit_zip(counted, check_and_visit)
            else:
                _visit_tar(counted, start, check_and_visit)


def refuse(path, reason):
    raise DamagedArchive(f"{path}: {reason}: damaged or malicious; get it from another place")


@contextmanager
def _one_line_if_damaged(path):
    try:
        yield
    except OptionError:
        raise  # a ValueError, too
    except (*_DAMAGED, *_SENSELESS, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk; gzip and bz2 give no number, and zip may seek to a wrong place
        raise DamagedArchive(
            f"{path}: damaged archive ({error or 'it ends too early'}); get it again, or from "
            "another place"
        ) from error


def _visit_zip(handle, visit):
    with zipfile.ZipFile(handle) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise zipfile.BadZipFile(f"{info.filename} is encrypted")
            mode = info.external_attr >> 16  # zero where the archive is not from Unix
            is_file = not info.is_dir() and stat.S_IFMT(mode) in (0, stat.S_IFREG)
            path = info.filename.replace("\\", "/")  # some programs on Windows
            member = Member(path, info.is_dir(), is_file, lambda info=info: archive.open(info))
            visit(member)


def _visit_tar(handle, start, visit):
    openers = (opener for magic, opener in _COMPRESSIONS.items() if start.startswith(magic))
    opener = next(openers, nullcontext)
    # tarfile's own decompression checks neither the checksum nor the end of the file
    with opener(handle) as content:
        with tarfile.open(fileobj=content, mode="r|", tarinfo=_StrictTarInfo) as archive:
            for info in archive:
                member = Member(
                    info.name,
                    info.isdir(),
                    info.isreg(),
                    lambda info=info: archive.extractfile(info),
                )
                visit(member)
        while content.read(CHUNK):
            pass


class _StrictTarInfo(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive):
        """Raise for damaged or missing headers, which tarfile takes for the end of the archive."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _read_through(member):
    if member.is_file:
        with member.open() as handle:
            while handle.read(CHUNK):
                pass
