"""Gates, a file each: every :class:`~fairseq_smoe.moe.gate.Gate` in this folder has a name."""
