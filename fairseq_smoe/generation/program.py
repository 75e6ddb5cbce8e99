"""What the translating commands have in common."""

import sys
from argparse import Namespace

from fairseq.dataclass.utils import convert_namespace_to_omegaconf


def structured(cfg):
    """The options by groups; programs also pass what ``argparse`` returns."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg


def is_ours(cfg):
    """Whether the command runs this project's task."""
    return getattr(cfg.task, "_name", None) == "smoe_translation"


def use_utf8():
    """Print translations in the encoding of the input and of --results-path, whatever the locale
    says."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
