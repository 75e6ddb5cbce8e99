"""Arrangements of blocks, one file each. See :class:`~fairseq_smoe.moe.arrangement.Arrangement`."""
