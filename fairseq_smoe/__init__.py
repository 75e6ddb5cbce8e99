"""Stratified mixture-of-experts translation for fairseq (Xu et al. 2023, arXiv 2305.02176).

fairseq loads this package through ``--user-dir``. Without fairseq, it can be imported for
``SMoEBlock``. ``Translator`` translates text with a trained model.
"""

import importlib
import sys

__version__ = "0.1.0"


def register():
    """Make the model, task and criterion known to fairseq. Safe to call again."""
    from fairseq_smoe import plugin  # noqa: F401


def __getattr__(name):
    if name == "SMoEBlock":  # imported only when used: torch takes seconds to import
        from fairseq_smoe.moe.block import SMoEBlock

        return SMoEBlock
    if name == "Translator":
        importlib.import_module("fairseq_smoe.evaluation").set_up_fairseq()
        return importlib.import_module("fairseq_smoe.inference.translator").Translator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# fairseq's commands import this package after fairseq itself
if "fairseq" in sys.modules:
    register()
