"""Parallel text to a folder that ``fairseq-train --task smoe_translation`` reads.

Steps: fetch, verify, clean, sentencepiece, encode, binarise, report. What is complete is skipped,
so that an interrupted call goes on where it was.
"""

from fairseq_smoe.preparation.options import add_arguments  # noqa: F401
from fairseq_smoe.preparation.progress import prepare


def run(args):
    prepare(args)
