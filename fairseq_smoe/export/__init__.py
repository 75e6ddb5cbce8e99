"""Trained models for other runtimes: ``python -m fairseq_smoe export``."""
