"""Reading text to translate: every line is one sentence, whatever is in it."""

import sys
from contextlib import contextmanager

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.warn import warn

BOM = b"\xef\xbb\xbf"
MOST_WARNINGS = 10


class TextLines:
    """The lines of a file or of standard input.

    Lines end at newlines alone: neither a carriage return nor one of Unicode's separators ends a
    line. Bytes that are not UTF-8 become U+FFFD, with a warning that names the line.

    Attributes:
        name: for messages.
        given: number of lines that have been given out.
    """

    def __init__(self, path):
        """
        Args:
            path: of the file; ``-`` for standard input.
        """
        self.path = path
        self.name = "standard input" if path == "-" else path
        self.given = 0
        self._damaged = 0

    def __iter__(self):
        """The lines without their ends and without white space around them, as strings.

        Raises:
            OptionError: the file cannot be read.
        """
        with self._open() as raw_lines:
            for number, line in enumerate(raw_lines, start=1):
                if text := line.removeprefix(BOM):
                    yield self._decode(text, number).strip()
        if self._damaged > MOST_WARNINGS:
            warn(f"{self.name}: {self._damaged} lines are not UTF-8")

    def buffers(self, size):
        """Lists of ``size`` lines, the last one of what is left."""
        buffer = []
        for line in self:
            buffer.append(line)
            if len(buffer) == size:
                yield from self._give(buffer)
                buffer = []
        if buffer:
            yield from self._give(buffer)

    def _give(self, buffer):
        count = len(buffer)
        yield buffer
        self.given += count

    @contextmanager
    def _open(self):
        if self.path == "-":
            # a program may have put something else in its place, which has text only
            yield getattr(sys.stdin, "buffer", None) or (
                line.encode("utf-8", errors="surrogateescape") for line in sys.stdin
            )
            return
        try:
            handle = open(self.path, "rb")
        except OSError as error:
            raise OptionError(f"--input {self.path}: {error.strerror}") from None
        with handle:
            yield handle

    def _decode(self, line, number):
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self._damaged += 1
            if self._damaged <= MOST_WARNINGS:
                warn(
                    f"{self.name}, line {number}: byte {error.start + 1}, "
                    f"0x{line[error.start]:02x}, is not UTF-8; U+FFFD is translated in its place"
                )
            return line.decode("utf-8", errors="replace")
