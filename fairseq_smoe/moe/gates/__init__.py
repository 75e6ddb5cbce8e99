"""Gates, one file each. Every :class:`~fairseq_smoe.moe.gate.Gate` in this folder has a name."""
