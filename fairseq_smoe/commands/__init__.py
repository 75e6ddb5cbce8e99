"""The commands of ``python -m fairseq_smoe``, a file each: arguments and one call."""
