"""Time, memory and disk of ``python -m fairseq_smoe prepare`` on a large pair of made-up text, and
what follows for more.

    python scripts/bench_prepare.py --pairs 20000000 --work /tmp/large --to results/bench_prepare
    python scripts/bench_prepare.py --from results/bench_prepare --pairs 1000000000 --workers 64

The first command writes the text to --work, prepares it with --workers processes, and measures each
step: seconds, the peak memory of the largest process (its own memory, and with the pages of files
that it has mapped), and the most bytes on disk. The second takes such results and computes the same
for a pair of another size and other workers. A job of a piece of text is as long as before, and
there are more of them; a job of a whole text is longer, and others do not help it; SentencePiece is
trained on as large a sample as before; what the command does by itself grows with the text.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from benchmarking import publish
from process_memory import Peaks
from tqdm import tqdm

from fairseq_smoe.preparation.options import STEPS
from fairseq_smoe.text_table import aligned

PAIR = ("de", "en")
BLOCK = 100_000  # sentences that are made once, and differ by a number at their end afterwards
WORDS = 30_000
JOBS_OF_A_PIECE = ("piece", "part", "job")


def made_text(work, pairs, repeated):
    """The folder of :func:`write_text` in ``work``, written if it is not there."""
    folder = work / f"text-{pairs}-{repeated:g}"
    if not folder.exists():
        unfinished = folder.with_name("unfinished")
        write_text(unfinished, pairs, repeated)
        unfinished.rename(folder)
    return folder


def write_text(folder, pairs, repeated, seed=1):
    """Sentences of 3 to 30 words.

    Args:
        repeated: share of lines that are equal to an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = {
        lang: [
            "".join(rng.choice(list("abcdefghijklmnoprstuwz"), rng.integers(2, 11)))
            for _ in range(WORDS)
        ]
        for lang in PAIR
    }
    lengths = rng.integers(3, 31, BLOCK)
    sentences = {
        lang: [" ".join(words[lang][i] for i in rng.zipf(1.3, n) % WORDS) for n in lengths]
        for lang in PAIR
    }
    for split, number in (("valid", 1000), ("test", 1000)):
        for lang in PAIR:
            lines = [f"{split} {sentence}\n" for sentence in sentences[lang][:number]]
            (folder / f"{split}.de-en.{lang}").write_text("".join(lines))
    files = [open(folder / f"train.de-en.{lang}", "w") for lang in PAIR]
    for start in tqdm(range(0, pairs, BLOCK), desc="write text", unit="block"):
        number = min(BLOCK, pairs - start)
        marks = np.arange(start, start + number)
        again = rng.random(number) < repeated
        marks[again] //= 2
        for lang, file in zip(PAIR, files):
            file.writelines(f"{sentences[lang][m % BLOCK]} {m}\n" for m in marks.tolist())
    for file in files:
        file.close()


def measure(args):
    """A dict for each step."""
    text, target = made_text(args.work, args.pairs, args.repeated), args.work / "data"
    results = []
    for step in args.steps:
        command = [sys.executable, "-m", "fairseq_smoe", "prepare", "--from", text, "--to", target]
        command += ["--pairs", "-".join(PAIR), "--vocab-size", "8000", "--workers", args.workers]
        command += ["--steps", step, "--lines-per-shard", args.lines_per_shard, *args.more]
        with Peaks(target) as peaks:
            if subprocess.run(list(map(str, command))).returncode:
                sys.exit(1)
        facts = json.loads((target / "steps.json").read_text())[step]
        results.append(
            {
                "step": step,
                "seconds": facts["seconds"],
                "parts": facts["parts"],
                "own_mib": peaks.own_mib,
                "all_mib": peaks.all_mib,
                "disk_gib": round(peaks.disk_bytes / 2**30, 2),
            }
        )
    return results


def extrapolate(measured, pairs, workers):
    """The results for a pair of another size and other workers."""
    settings = measured["settings"]
    more = pairs / settings["pairs"]
    return [
        {
            **result,
            "seconds": seconds_of(result, more, settings["workers"], workers),
            "disk_gib": result["disk_gib"] * more,
        }
        for result in measured["results"]
    ]


def seconds_of(result, more, before, workers):
    """Seconds of a step for ``more`` times as much text.

    Args:
        before: workers that it was measured with.
    """
    alone = result["seconds"] - sum(part["seconds"] for part in result["parts"])
    total = max(0, alone) * more
    for part in result["parts"]:
        if part["unit"] == "call":  # the training of SentencePiece
            total += part["seconds"]
        elif part["unit"] in JOBS_OF_A_PIECE:
            work = part["seconds"] * min(before, part["jobs"])
            total += work * more / min(workers, part["jobs"] * more)
        else:
            total += part["seconds"] * more
    return total


def as_markdown(results, pairs, workers):
    rows = [
        (
            r["step"],
            duration(r["seconds"]),
            f"{r['own_mib']} ({r['all_mib']})",
            f"{r['disk_gib']:.1f}" if r["disk_gib"] < 100 else f"{r['disk_gib']:.0f}",
        )
        for r in results
    ]
    header = (
        f"{pairs:,} pairs, {workers} workers",
        "time",
        "largest process, MiB (with mapped files)",
        "GiB on disk at most",
    )
    return "\n".join(aligned(header, rows, left=1))


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=int, default=20_000_000, help="pairs of lines (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes (default: %(default)s)")
    add("--lines-per-shard", type=int, default=5_000_000, help="(default: %(default)s)")
    add("--repeated", type=float, default=0, help="share of repeated lines (default: %(default)s)")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="(default: all)")
    add("--work", type=Path, metavar="DIR", help="folder for text and data")
    add("--to", type=Path, metavar="DIR", help="write results.json and table.md there")
    add("--from", dest="source", type=Path, metavar="DIR", help="compute from the results there")
    args, args.more = parser.parse_known_args()
    if args.source:
        measured = json.loads((args.source / "results.json").read_text())
        results = extrapolate(measured, args.pairs, args.workers)
        print(as_markdown(results, args.pairs, args.workers))
        return
    if args.work is None:
        parser.error("--work: give a folder for text and data")
    results = measure(args)
    publish(as_markdown(results, args.pairs, args.workers), args, {"results": results}, None)


if __name__ == "__main__":
    main()
