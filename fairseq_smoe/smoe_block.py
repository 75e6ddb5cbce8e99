"""Where :class:`SMoEBlock` was; it is in :mod:`fairseq_smoe.moe.block` now."""

from fairseq_smoe.moe.block import *  # noqa: F403
