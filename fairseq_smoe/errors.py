"""Errors that a user can act on. The command line prints them as a single line."""

import re
from contextlib import contextmanager


class OneLineError(Exception):
    """Shown without a traceback (see ``compat.print_user_errors_in_one_line``)."""


class OptionError(OneLineError, ValueError):
    """A wrong option or file: names it, the value, and what would be right."""


class NonFiniteGateError(OneLineError, FloatingPointError):
    """A gate produced NaN or infinity: names the layer."""


class CheckpointError(OneLineError):
    """A checkpoint cannot be read or written: names its file."""


class DiskFullError(OptionError):
    """The disk is full: names the file that was not written."""


@contextmanager
def complaints_in_one_line():
    """What fairseq says about an option, or about a package that is not installed, without its
    traceback."""
    try:
        yield
    except OneLineError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        about_option = re.search(r"(^|[^-\w])--[a-z]", message)
        missing_package = isinstance(error, ImportError) and "install" in message
        if about_option or missing_package:
            raise OptionError(message) from error
        raise
