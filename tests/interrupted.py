"""``interrupted.py SIGTERM|SIGKILL UPDATE OPTIONS``: fairseq-train, which gets a signal right after
an update."""

import os
import signal
import sys

from fairseq_cli import train  # first, as it sets up logging

# isort: split
from fairseq.trainer import Trainer

number, update = getattr(signal, sys.argv.pop(1)), int(sys.argv.pop(1))
stock = Trainer.train_step


def train_step(self, *args, **kwargs):
    logged = stock(self, *args, **kwargs)
    if self.get_num_updates() == update:
        sys.stdout.flush()
        os.kill(os.getpid(), number)
    return logged


Trainer.train_step = train_step

if __name__ == "__main__":
    train.cli_main()
