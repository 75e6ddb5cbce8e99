"""Importing the modules with a user's own gates, experts and arrangements.

Only modules named on the command line are imported. A checkpoint names classes too, in the options
of its model, but a downloaded file must not decide which code runs.
"""

import argparse
import importlib
import os
import sys

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.doors import DOORS

MODULES_HELP = (
    "modules with gates, experts or arrangements of your own that a checkpoint needs, joined by "
    "commas; the current folder is searched, too. Their code is executed, so name only modules "
    "that you trust"
)


def import_named_modules(words):
    """Import the modules that are named by ``--moe-modules`` or, in ``module:Class``, by the flags
    of :data:`~fairseq_smoe.moe.doors.DOORS`.

    Args:
        words: words of a command line; other options are ignored.

    Raises:
        OptionError: a module cannot be imported.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--moe-modules", action="append", nargs="?", default=[])
    for flag in DOORS:
        parser.add_argument(flag, action="append", nargs="?", default=[], dest=flag)
    given = vars(parser.parse_known_args(words)[0])
    for flag, values in given.items():
        for name in ",".join(filter(None, values)).split(","):
            module, colon, _ = name.partition(":")
            if flag == "moe_modules" and name:
                _import("--moe-modules", name)
            elif colon:
                _import(flag, module)


def _import(flag, name):
    sys.path.insert(0, os.getcwd())  # not on the path of an installed command
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            f"{flag} {name}: cannot be imported ({error}); give a module in the current folder, "
            "or one that is installed or on PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
