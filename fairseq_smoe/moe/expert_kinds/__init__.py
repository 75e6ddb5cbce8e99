"""Kinds of experts, one file each. Every :class:`~fairseq_smoe.moe.experts.Experts` has a name."""
