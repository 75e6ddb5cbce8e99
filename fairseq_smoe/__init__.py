"""Stratified mixture-of-experts translation for fairseq (Xu et al. 2023, arXiv 2305.02176).

fairseq loads this package through ``--user-dir``. Imported on its own, as for
``fairseq_smoe.smoe_block``, it does not need fairseq.
"""

import sys

__version__ = "0.1.0"


def register():
    """Make the model, task and criterion known to fairseq. Safe to call again."""
    from fairseq_smoe import plugin  # noqa: F401


# fairseq's commands import this package after fairseq itself
if "fairseq" in sys.modules:
    register()
