"""Warnings of the translating commands: on standard error, as fairseq logs to standard output."""

import sys


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)
