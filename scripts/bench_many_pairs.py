"""How fast a training on many directions starts, and in how much memory.

    python scripts/bench_many_pairs.py --pairs 100 --sentences 20000000

Makes a corpus of sentence pairs in --pairs language pairs, each trained in both directions, and one
of a few sentences in the same directions. Runs the first two updates of ``fairseq-train`` on both,
and prints, for each, the seconds until the second update is done and the peak memory: memory of
the process itself (``RssAnon``), and all resident memory (``VmHWM``), which counts pages of the
mapped files as well. The system takes those back when memory is short.

Sentences have the lengths of real text (a log-normal distribution with mean 26). To save disk, all
sentences of a file lie on the same bytes of it.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from process_memory import memory_kib

WORDS = 1000
MOST_TOKENS = 250
FEW = 50  # sentence pairs of a language pair in the small corpus
COMMANDS = Path(sys.executable).parent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=20_000_000, metavar="N")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="(default: none)")
    parser.add_argument("--temperature", type=float, default=1, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch (default: 4096)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--user-dir", type=Path, default=Path(__file__).parents[1] / "fairseq_smoe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all measurements in FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        corpora = {
            "small": write_corpus(folder / "small", args.pairs, FEW * args.pairs, 1),
            "large": write_corpus(folder / "large", args.pairs, args.sentences, args.shards),
        }
        results = {name: [] for name in corpora}
        for _ in range(args.rounds):
            for name, data in corpora.items():
                results[name].append(measure(data, args))
                print(name, results[name][-1], file=sys.stderr)
    print_table(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def write_corpus(folder, num_pairs, num_sentences, shards):
    """A folder of binarised data; the pairs have sizes of a geometric series, 1 to 100."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    languages = ["en", *(f"x{i:03d}" for i in range(num_pairs))]
    words = "".join(f"word{i} 1\n" for i in range(WORDS))
    for language in languages:
        (folder / f"dict.{language}.txt").write_text(words)
    (folder / "langs.txt").write_text("\n".join(languages) + "\n")
    share = np.geomspace(1, 100, num_pairs)
    sizes = np.maximum(8, num_sentences * share / share.sum()).astype(int)
    for language, size in zip(languages[1:], sizes):
        for shard in range(shards):
            where = folder / f"shard{shard:03d}" if shards > 1 else folder
            where.mkdir(exist_ok=True)
            for side in ("en", language):
                write_side(where / f"train.en-{language}.{side}", size // shards, rng)
    return folder


def write_side(path, number, rng):
    """``path.bin`` and ``path.idx`` of that many sentences, all of which end at the same token."""
    lengths = np.exp(rng.normal(3.0, 0.7, number)).astype("<i4").clip(2, MOST_TOKENS)
    tokens = rng.integers(4, 4 + WORDS, MOST_TOKENS).astype("<u2")
    tokens[-1] = 2  # end of sentence
    Path(f"{path}.bin").write_bytes(tokens.tobytes())
    with open(f"{path}.idx", "wb") as handle:
        handle.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]))
        handle.write(int(number).to_bytes(8, "little"))
        handle.write(lengths.data)
        handle.write((2 * (MOST_TOKENS - lengths).astype("<i8")).data)


def measure(data, args):
    """``{"seconds", "cpu_seconds", "anonymous_mib", "resident_mib"}`` of two updates."""
    command = [
        *(COMMANDS / "fairseq-train", data, "--user-dir", args.user_dir, "--cpu"),
        *("--task", "smoe_translation", "--arch", "smoe_transformer_tiny"),
        *("--criterion", "moe_label_smoothed_cross_entropy", "--optimizer", "adam"),
        *("--max-tokens", args.tokens, "--max-update", 2, "--no-save", "--disable-validation"),
        *("--sampling-temperature", args.temperature, "--num-workers", 0, "--seed", 1),
        *("--log-format", "json", "--log-interval", 1),
    ]
    started = time.monotonic()
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        peak = {"RssAnon": 0, "VmHWM": 0}
        watcher = threading.Thread(target=watch, args=(process.pid, peak))
        watcher.start()
        log, seconds = [], None
        for line in process.stdout:
            log.append(line)
            if seconds is None and re.search(r'"num_updates": "2"', line):
                seconds = time.monotonic() - started
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        watcher.join()
    if status or seconds is None:
        sys.exit(f"error: fairseq-train failed:\n{''.join(log)[-3000:]}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "anonymous_mib": peak["RssAnon"] / 1024,
        "resident_mib": peak["VmHWM"] / 1024,  # ru_maxrss begins with this process's own
    }


def watch(process, peak):
    """Keep the highest values of a process's memory, in kilobytes, until it ends."""
    while True:
        found = memory_kib(process)
        if "RssAnon" not in found:  # has ended
            return
        for name in peak:
            peak[name] = max(peak[name], found[name])
        time.sleep(0.01)


def print_table(results, args):
    middle = {
        (name, what): statistics.median(run[what] for run in results[name])
        for name in results
        for what in results[name][0]
    }
    print(
        f"{2 * args.pairs} directions, temperature {args.temperature:g}, {args.shards} shards, "
        f"medians of {args.rounds} rounds.\n"
    )
    print("| sentence pairs | seconds | of CPU | memory, MiB | with mapped files, MiB |")
    print("|---:|---:|---:|---:|---:|")
    rows = {"small": FEW * args.pairs, "large": args.sentences}
    for name, number in rows.items():
        values = [middle[name, what] for what in results[name][0]]
        print("| " + " | ".join([f"{number:,}", *(f"{value:,.0f}" for value in values)]) + " |")
    more = [middle["large", what] - middle["small", what] for what in results["small"][0]]
    print("| difference | " + " | ".join(f"{value:,.0f}" for value in more) + " |")


if __name__ == "__main__":
    main()
