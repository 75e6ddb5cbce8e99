"""Kinds of experts, a file each: every :class:`~fairseq_smoe.moe.experts.Experts` here has a name."""
