"""Downloading one file over HTTP, resuming it whenever the connection breaks."""

import email.utils
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request

from fairseq_smoe.errors import OptionError

TIMEOUT = 60.0  # seconds without a single byte
FIRST_WAIT = 1.0  # seconds before the first retry; doubled for each further one
LONGEST_WAIT = 60.0
LONGEST_REQUESTED_WAIT = 600.0  # a server may ask for more patience, up to this
CHUNK = 1 << 16  # bytes


class _Interrupted(Exception):
    """A transfer ended early, for a reason that may pass."""

    def __init__(self, reason, requested_wait=0.0):
        super().__init__(str(reason))
        self.requested_wait = requested_wait  # seconds


def receive(download, handle, batch):
    """Append the missing rest of ``download.url`` to ``handle``, an unbuffered file.

    ``batch`` (see download.py) has the number of retries, is told the progress, and may stop this.

    Raises:
        OptionError: the server refuses, or no retry in a row brought a new byte.
    """
    failures, farthest = 0, size_of(handle)
    while True:
        try:
            return _receive_some(download, handle, batch)
        except _Interrupted as error:
            # bytes that are received again, after a restart from zero, are no progress
            if size_of(handle) > farthest:
                failures, farthest = 0, size_of(handle)
            failures += 1
            if failures > batch.retries:
                raise OptionError(
                    f"{download.url}: {error}; gave up after {batch.retries} retries: run the "
                    f"same command again later, which goes on from there, or {download.remedy}"
                ) from None
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1)
            batch.sleep(max(wait, min(error.requested_wait, LONGEST_REQUESTED_WAIT)), error)


def _receive_some(download, handle, batch):
    """Make one request for the missing bytes."""
    known = _read_version(download)
    too_long = download.size is not None and size_of(handle) > download.size
    if too_long or not (known or download.sha256):
        empty(handle, batch)  # nothing would tell if the file changed on the server
    offset = size_of(handle)
    if offset == download.size:
        return
    with _request(download, offset, known) as response:
        if response.status == 416:
            if response.headers.get("Content-Range") == f"bytes */{offset}":
                return  # complete already
            empty(handle, batch)
            raise _Interrupted("the server has fewer bytes than were received before")
        version = _version(response.headers)
        if response.status != 206:
            empty(handle, batch)
            version_file(download).write_text(version or "", encoding="utf-8")
        elif not _continues(response, offset) or (known and version not in (None, known)):
            empty(handle, batch)
            raise _Interrupted("the server sent another part of the file than was asked for")
        length = response.headers.get("Content-Length")
        total = None if length is None else size_of(handle) + int(length)
        if total is not None:
            batch.expect(download, total)
        while chunk := _read(response):
            _write(chunk, handle)
            batch.advance(len(chunk))
        if total is not None and size_of(handle) < total:
            raise _Interrupted(f"the connection ended after {size_of(handle)} of {total} bytes")


def _request(download, offset, version):
    """An answer with status 200, 206 or 416."""
    if not re.match("https?://", download.url):
        raise OptionError(f"{download.url}: not an http or https address; {download.remedy}")
    headers = {"User-Agent": "fairseq-smoe", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    try:
        request = urllib.request.Request(download.url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:
            return error
        reason = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(reason, _retry_after(error.headers)) from None
        raise OptionError(f"{download.url}: {reason}; {download.remedy}") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise OptionError(f"{download.url}: {error}; {download.remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(getattr(error, "reason", error)) from None


def _retry_after(headers):
    """The server's Retry-After in seconds; servers send a number or a date."""
    value = headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


def _continues(response, offset):
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _read(response):
    try:
        return response.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(error) from None


def _write(chunk, handle):
    left = memoryview(chunk)
    while left:
        left = left[handle.write(left) :]  # an unbuffered file may write less than it is given


def size_of(handle):
    return os.fstat(handle.fileno()).st_size


def empty(handle, batch):
    batch.advance(-size_of(handle))
    handle.truncate(0)


def version_file(download):
    """The file beside the part with the version that the part belongs to, for ``If-Range``."""
    return download.path.with_name(download.path.name + ".part.version")


def _read_version(download):
    path = version_file(download)
    return path.read_text(encoding="utf-8") if path.exists() else None


def _version(headers):
    tag = headers.get("ETag")
    # weak tags may be the same for different bytes
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
