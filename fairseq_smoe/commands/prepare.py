"""Turn parallel text into a folder that ``fairseq-train --task smoe_translation`` reads.

Steps: fetch, verify, clean, sentencepiece, encode, binarise, report. Skips what is
complete, so that an interrupted call continues where it stopped.
"""

from fairseq_smoe.preparation.options import add_arguments  # noqa: F401
from fairseq_smoe.preparation.progress import prepare


def run(args):
    prepare(args)
