"""Validation losses over updates of several runs, from fairseq's JSON logs, as TSV.

usage: python scripts/validation_losses.py RUN_DIR...   (each with a train.log)
"""

import json
import re
import sys
from pathlib import Path


def read_validations(path):
    """``{updates: negative log-likelihood in bits per token}``"""
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.search(r"\{.*\"valid_nll_loss\".*\}", line):
            record = json.loads(match[0])
            losses[int(record["valid_num_updates"])] = float(record["valid_nll_loss"])
    return losses


def main(folders):
    runs = {Path(folder).name: read_validations(Path(folder) / "train.log") for folder in folders}
    print("updates", *runs, sep="\t")
    for updates in sorted(set().union(*runs.values())):
        print(updates, *(losses.get(updates, "") for losses in runs.values()), sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:]) if sys.argv[1:] else sys.exit(__doc__)
