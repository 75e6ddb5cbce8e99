"""Several processes that train one model, compared with one process with the same threads.

    python scripts/bench_ranks.py data-bin --row smoe-2-2-2-2 --scale small --processes 2

Runs real trainings with the options of `scripts/train.sh` on the CPU, in alternating rounds, with
the same number of tokens per update:

* one process with one thread for each process of the others;
* several processes of one thread under torchrun, each with all experts (expert-parallel size 1);
* the same, with the experts sharded over the processes.

Prints Markdown: tokens per second relative to the single process, as median and quartiles over the
rounds. The speed of a training is taken from its log, without the first updates.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import add_common_options, machine, quartiles, told
from tqdm import tqdm

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.benchmarks.training_command import training_command
from fairseq_smoe.translation.data_manager import all_directions

WARM_UP = 3  # updates


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", type=Path, help="folder that prepare has made")
    add("--benchmark", choices=benchmarks.NAMES, default="m4", help="(default: %(default)s)")
    add("--row", default="smoe-2-2-2-2", help="(default: %(default)s)")
    add("--scale", choices=SCALES, default="small", help="(default: %(default)s)")
    add("--processes", type=int, default=2, help="(default: %(default)s)")
    add("--tokens", type=int, default=4096, help="in an update, in total (default: %(default)s)")
    add("--updates", type=int, default=15, help="of every training (default: %(default)s)")
    add_common_options(parser, rounds=3)
    args = parser.parse_args()
    contestants = {
        "1 process": (1, 1),
        f"{args.processes} processes": (args.processes, 1),
        f"{args.processes} processes, experts sharded over them": (args.processes, args.processes),
    }
    speeds = {name: [] for name in contestants}
    with tqdm(total=args.rounds * len(contestants), unit="training") as progress:
        for _ in range(args.rounds):
            for name, (processes, size) in contestants.items():
                progress.set_description(name)
                speeds[name].append(tokens_per_second(args, processes, size))
                progress.update()
    print(as_markdown(args, speeds))


def tokens_per_second(args, processes, size):
    """Median over the updates of one training."""
    benchmark = benchmarks.load(args.benchmark)
    with tempfile.TemporaryDirectory() as folder:
        command = training_command(
            benchmark,
            benchmark.row(args.row),
            args.scale,
            args.data.absolute(),
            Path(folder),
            args.seed,
            args.tokens // args.processes,
            args.processes // processes,
            [
                *("--cpu", "--lang-pairs", ",".join(all_directions(str(args.data), "train"))),
                *("--max-update", str(args.updates), "--log-interval", "1", "--no-save"),
                *("--disable-validation", "--moe-expert-parallel-size", str(size)),
            ],
        )
        command.remove("--eval-bleu")
        if processes > 1:
            nodes = ("--standalone", "--nproc_per_node", str(processes), "--no-python")
            command = ["torchrun", *nodes, *command]
        threads = args.processes // processes
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
    speeds = [float(n) for n in re.findall(r'train_inner.*"wps": "([\d.]+)"', done.stdout)]
    if done.returncode or len(speeds) <= WARM_UP:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return statistics.median(speeds[WARM_UP:])


def as_markdown(args, speeds):
    first = next(iter(speeds.values()))
    facts = machine()
    title = f"{args.benchmark} {args.row}, scale {args.scale}, {args.tokens} tokens an update"
    lines = [
        f"{facts['date']}, {facts['cores']} cores of {facts['processor']}, torch {facts['torch']}",
        "",
        f"| {title} | tokens per second, relative (quartiles) |\n|---|---:|",
    ]
    for name, values in speeds.items():
        low, median, high = quartiles([a / b for a, b in zip(values, first)])
        lines.append(f"| {name} | {told(median, low, high)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
