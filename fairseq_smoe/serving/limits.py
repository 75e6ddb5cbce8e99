"""Limits of what a server does for whom."""

import hashlib
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import read_lines

MOST_CLIENTS = 10_000  # whose rate is remembered


@dataclass(frozen=True)
class Limits:
    """Of a request.

    Attributes:
        body: bytes.
        texts: strings in ``q``.
        characters: in ``q``.
        alternatives: further translations.
        timeout: seconds until a request is answered by an error.
    """

    body: int
    texts: int
    characters: int
    alternatives: int
    timeout: float


class RateLimit:
    """A bucket of requests for each client, which fills up evenly.

    Args:
        per_minute: requests; 0 for no limit.
    """

    def __init__(self, per_minute, clock=time.monotonic):
        self._per_minute, self._clock = per_minute, clock
        self._buckets = OrderedDict()  # client -> (requests left, when), the least recent first

    def wait(self, client):
        """Seconds that a client has to wait; 0 if it may ask now, which is counted."""
        if not self._per_minute:
            return 0
        now = self._clock()
        left, before = self._buckets.pop(client, (self._per_minute, now))
        left = min(self._per_minute, left + (now - before) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        while len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else (1 - left) * 60 / self._per_minute


class Keys:
    """API keys, compared in a time that tells nothing about them.

    Args:
        path: file with one key a line; None to let everyone in.

    Raises:
        OptionError: the file has no key.
    """

    def __init__(self, path):
        self._hashes = None
        if path is not None:
            lines = read_lines(path, "give a file with one key a line")
            self._hashes = [_hash(line.strip()) for line in lines if line.strip()]
            if not self._hashes:
                raise OptionError(f"--keys {path}: has no key; write one a line")

    def accept(self, key):
        if self._hashes is None:
            return True
        given = _hash(key if isinstance(key, str) else "")
        # all are compared, whichever agrees
        return sum([hmac.compare_digest(given, known) for known in self._hashes]) > 0


def _hash(key):
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
