"""Arrangements of blocks, a file each: see :class:`~fairseq_smoe.moe.arrangement.Arrangement`."""
