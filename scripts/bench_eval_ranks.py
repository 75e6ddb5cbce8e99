"""``python -m fairseq_smoe evaluate`` on several ranks, compared with one process.

    python scripts/bench_eval_ranks.py --sentences 2000 --directions 8 --ranks 2

Makes test sets of made-up sentences with the lengths of real text, and an untrained SMoE model,
whose translations are as long as the longest source of their batch.
Translates all of them in alternating rounds, in one process of one thread and on ranks of one
thread each under torchrun, and checks that the files are the same. Prints Markdown with medians:

* seconds of the command, from its start to its end;
* seconds of translating, without the start;
* CPU seconds of the busiest process: what the command would take on idle cores;
* the same without the start, which is that of a command that has nothing left to translate.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_many_pairs import COMMANDS, write_corpus

# runs the command; notes how much processor time it took
PROCESS = """
import os, sys, time
from pathlib import Path
from fairseq_smoe.__main__ import main
main(sys.argv[2:])
Path(sys.argv[1], os.environ.get("RANK", "0")).write_text(str(time.process_time()))
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sentences", type=int, default=2000, help="in all (default: %(default)s)")
    add("--directions", type=int, default=8, help="an even number (default: %(default)s)")
    add("--ranks", type=int, default=2, help="(default: %(default)s)")
    add("--width", type=int, default=256, help="of the model (default: %(default)s)")
    add("--layers", type=int, default=3, help="of encoder and decoder (default: %(default)s)")
    add("--tokens", type=int, default=2000, help="of a batch (default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--folder", type=Path, help="for temporary files")
    add("--json", type=Path, metavar="FILE", help="keep all measurements in FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        make_model(args, folder)
        names = {"1 process": 1, f"{args.ranks} ranks": args.ranks}
        results = {name: [] for name in names}
        files = []
        for _ in range(args.rounds):
            for name, ranks in names.items():
                results[name].append(measure(args, folder, ranks))
                print(name, results[name][-1], file=sys.stderr)
                files.append(translations(folder))
        if any(each != files[0] for each in files):
            sys.exit("error: the translations differ")
    print_table(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def make_model(args, folder):
    """``folder/data`` and ``folder/run``."""
    data, pairs = folder / "data", args.directions // 2
    write_corpus(data, pairs, 50 * pairs, 1)
    write_corpus(folder / "test", pairs, args.sentences // 2, 1)
    for path in (folder / "test").glob("train.*"):
        shutil.copy(path, data / path.name.replace("train", "test", 1))
    run(
        *(COMMANDS / "fairseq-train", data, "--user-dir", user_dir(), "--cpu"),
        *("--task", "smoe_translation", "--arch", "smoe_transformer_tiny", "--smoe-strata", "4-4"),
        *("--encoder-embed-dim", args.width, "--encoder-ffn-embed-dim", 4 * args.width),
        *("--encoder-layers", args.layers, "--decoder-layers", args.layers),
        *("--criterion", "moe_label_smoothed_cross_entropy", "--optimizer", "adam"),
        *("--max-tokens", 1000, "--max-update", 1, "--disable-validation", "--num-workers", 0),
        *("--save-dir", folder / "run" / "checkpoints", "--no-epoch-checkpoints"),
    )
    last = folder / "run" / "checkpoints" / "checkpoint_last.pt"
    last.rename(last.with_name("checkpoint_best.pt"))


def measure(args, folder, ranks):
    """``{"seconds", "translating", "cpu_seconds", "cpu_translating"}``"""
    shutil.rmtree(folder / "run" / "evaluation", ignore_errors=True)
    seconds, cpu = evaluate(args, folder, ranks)
    facts = [json.loads(path.read_text()) for path in test_folder(folder).glob("*-*.json")]
    return {
        "seconds": seconds,
        "translating": sum(each["seconds"] for each in facts) / ranks,
        "cpu_seconds": cpu,
        "cpu_translating": cpu - evaluate(args, folder, 1)[1],
    }


def evaluate(args, folder, ranks):
    """Seconds of the command, and CPU seconds of its busiest process."""
    times = folder / "times"
    shutil.rmtree(times, ignore_errors=True)
    times.mkdir()
    command = [
        *("python", "-c", PROCESS, times, "evaluate", "--run", folder / "run", "--no-score"),
        *("--data", folder / "data", "--cpu", "--max-tokens", args.tokens),
        # an untrained model does not end its sentences
        *("--max-len-a", 1, "--max-len-b", 0),
    ]
    if ranks == 1:
        command += ["--processes", 1]
    else:
        torchrun = [COMMANDS / "torchrun", "--standalone", "--nproc_per_node", ranks]
        command = [*torchrun, "--no-python", "--", *command]
    started = time.monotonic()
    run(*command)
    seconds = time.monotonic() - started
    return seconds, max(float(path.read_text()) for path in times.iterdir())


def translations(folder):
    return {path.name: path.read_bytes() for path in sorted(test_folder(folder).glob("*.hyp.*"))}


def test_folder(folder):
    return folder / "run" / "evaluation" / "test"


def user_dir():
    return Path(__file__).parents[1] / "fairseq_smoe"


def run(*command):
    path = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")


def print_table(results, args):
    print(
        f"{args.sentences:,} sentences, {args.directions} directions, medians of {args.rounds} "
        "alternating rounds.\n"
    )
    print("| | seconds | translating | CPU seconds, busiest process | translating |")
    print("|---|---:|---:|---:|---:|")
    for name, runs in results.items():
        middle = [statistics.median(each[what] for each in runs) for what in runs[0]]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in middle) + " |")
    one, several = results.values()
    ratios = [statistics.median(a[what] / b[what] for a, b in zip(one, several)) for what in one[0]]
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
