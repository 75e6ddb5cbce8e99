"""How long a training on many directions takes to start, and how much memory that needs.

Starts ``fairseq-train FOLDER`` with a tiny model on the CPU, up to its first update, with fairseq's
``translation_multi_simple_epoch`` and with ``smoe_translation``, in turns. Both train both
directions of all pairs that have training and validation files; with other pairs, fairseq's task
does not start. Time counts from the start of the command, including imports and the dry run over
the validation set. Memory is the largest resident set of the main process until then. Prints
medians as a Markdown table. Example:

    python scripts/bench_startup.py data-bin --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from process_memory import memory_kib

REPOSITORY = Path(__file__).resolve().parents[1]
TASKS = ("translation_multi_simple_epoch", "smoe_translation")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="binarised data with langs.txt, not in shards")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    pairs = sorted(pairs_of(args.folder, "train") & pairs_of(args.folder, "valid"))
    if not pairs:
        parser.error(f"{args.folder}: no pair has train and valid files directly in this folder")
    directions = [d for pair in pairs for d in (pair, "-".join(reversed(pair.split("-"))))]
    results = {task: [] for task in TASKS}
    for number in range(args.rounds):
        for task in TASKS:
            results[task].append(start(args.folder, task, directions))
            seconds, gib = results[task][-1]
            print(f"round {number + 1}: {task}: {seconds:.1f} s, {gib:.2f} GiB", file=sys.stderr)
    print(f"{len(directions)} directions, {args.rounds} rounds\n")
    print("| task | seconds to the first update | peak memory, GiB |")
    print("|---|---|---|")
    for task, rows in results.items():
        seconds, gib = (statistics.median(column) for column in zip(*rows))
        print(f"| `{task}` | {seconds:.1f} | {gib:.2f} |")


def pairs_of(folder, split):
    return {path.name.split(".")[1] for path in folder.glob(f"{split}.*-*.idx")}


def start(folder, task, directions):
    """``(seconds, GiB)`` until the first update is logged; the training is then stopped."""
    langs = ",".join((folder / "langs.txt").read_text().split())
    command = [
        *(Path(sys.executable).with_name("fairseq-train"), folder, "--task", task),
        *("--user-dir", REPOSITORY / "fairseq_smoe", "--cpu", "--num-workers", 0),
        *("--langs", langs, "--lang-pairs", ",".join(directions)),
        *("--encoder-langtok", "tgt", "--decoder-langtok"),
        *("--sampling-method", "temperature", "--sampling-temperature", 1),
        *("--arch", "smoe_transformer_tiny", "--criterion", "moe_label_smoothed_cross_entropy"),
        *("--optimizer", "adam", "--lr", 1e-3, "--max-tokens", 1000),
        *("--no-save", "--log-format", "json", "--log-interval", 1),
    ]
    began = time.monotonic()
    training = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = []
    try:
        for line in training.stdout:
            if "| train_inner |" in line:
                return time.monotonic() - began, peak_memory(training.pid)
            lines.append(line)
    finally:
        training.kill()
        training.wait()
    sys.exit("".join(lines[-20:]) + f"{task}: ended without an update")


def peak_memory(pid):
    """Largest resident set so far of a running process, in GiB (Linux)."""
    return memory_kib(pid)["VmHWM"] / 2**20


if __name__ == "__main__":
    main()
