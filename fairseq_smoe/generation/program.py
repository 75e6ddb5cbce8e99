"""What the translating commands have in common."""

import sys
from argparse import Namespace
from types import SimpleNamespace

from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_smoe.patching import Overlay


def structured(cfg):
    """The options by groups; programs also pass what ``argparse`` returns."""
    return convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg


def is_ours(cfg):
    """Whether the command runs this project's task."""
    name = cfg.task if isinstance(cfg.task, str) else getattr(cfg.task, "_name", None)
    return name == "smoe_translation"


def changing_task(module, change):
    """``module.tasks`` as a program uses it, but ``change(task)`` is called for the task it sets up."""
    stock = module.tasks

    def setup_task(*args, **kwargs):
        task = stock.setup_task(*args, **kwargs)
        change(task)
        return task

    return Overlay(stock, SimpleNamespace(setup_task=setup_task))


def use_utf8():
    """Print translations in the encoding of the input and of --results-path, whatever the locale
    says."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")
