"""Former place of :class:`SMoEBlock`, which is now in :mod:`fairseq_smoe.moe.block`."""

from fairseq_smoe.moe.block import *  # noqa: F403
