"""Checks of the text before cleaning."""

from itertools import islice

from fairseq_smoe.errors import OptionError

BLOCK_LINES = 100_000


def verify_pair(folder, split, pair, strict):
    """Check the two files of a split.

    Args:
        strict: whether a line that is not UTF-8 is an error.

    Returns:
        :func:`state_of` both files, by name.

    Raises:
        OptionError: names the file and the line, or both numbers of lines.
    """
    paths = [(folder / f"{split}.{pair}.{lang}") for lang in pair.split("-")]
    states = {path.name: state_of(path) for path in paths}
    counts = [_count_lines(path, strict) for path in paths]
    if counts[0] != counts[1]:
        first, second = (path.resolve() for path in paths)
        raise OptionError(
            f"{first} has {counts[0]} lines, {second} has {counts[1]}: they must be parallel; "
            "repair them or give another --from, with --redo fetch"
        )
    return states


def state_of(path):
    """``[bytes, nanoseconds of its last change]``, to detect changes of a file.

    Raises:
        OptionError: the file is gone.
    """
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise OptionError(
            f"{path.resolve()}: was there, and is gone; bring it back, or give --redo fetch"
        ) from error
    return [state.st_size, state.st_mtime_ns]


def _count_lines(path, strict):
    number = 0
    with open(path, "rb") as handle:
        while block := list(islice(handle, BLOCK_LINES)):
            if strict:
                _check_utf8(path, block, number)
            number += len(block)
    return number


def _check_utf8(path, lines, before):
    try:
        b"".join(lines).decode("utf-8")
    except UnicodeDecodeError:
        for number, line in enumerate(lines, before + 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise OptionError(
                    f"{path.resolve()}: line {number} is not UTF-8; repair it, or give "
                    "--invalid-utf8 drop"
                ) from error
