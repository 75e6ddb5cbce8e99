"""The commands of ``python -m fairseq_smoe``, one file each: its arguments and one call."""
