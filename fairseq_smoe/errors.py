"""Errors that a user can act on. The command line prints them as a single line."""


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
