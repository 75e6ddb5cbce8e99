"""Training steps of the rows of a table compared with those of its dense model.

Every step is a whole step of the trainer: forward, loss, backward, clipping, optimizer, logging. It
runs on made-up sentences of 10 to 50 words, with the options of `scripts/train.sh`. The row and the
dense model take turns in one process. Efficiency is tokens per second times FLOPs per token, both
relative to the dense model: 1 is as fast as dense arithmetic. Example:

    python scripts/bench_train.py --rows smoe-2-2-2-2 vanilla-moe --tokens 4096

With --options, rows with further options of fairseq-train are compared with the same rows without
them, in time and in peak memory:

    python scripts/bench_train.py --rows dense smoe-2-2-2-2 \\
        --options "--chunked-loss 512" "--optimizer fused_adam"
"""

import argparse
import gc
import shlex
import subprocess
import sys

import torch
from benchmarking import (
    build,
    compare_rows,
    in_turns,
    make_parser,
    publish,
    quartiles,
    start,
    told,
)
from process_memory import memory_kib
from tqdm import tqdm

from fairseq_smoe.diagnosis.untrained import made_up_batch

STEPS_FOR_MEMORY = 3  # the optimizer has its state from the end of the first on


def main():
    parser = make_parser(__doc__, tokens=4096, rounds=5)
    parser.add_argument("--options", nargs="+", metavar="OPTIONS", help="one word for every set")
    # for the processes that are started to measure memory
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of is not None:
        print_peak_memory(args)
    elif args.options:
        compare_options(args)
    else:
        compare_rows(args, stepper, f"{args.tokens} tokens a step")


def stepper(benchmark, row, args, use_cuda, more=()):
    """A function that makes one update."""
    cfg, task, model, criterion = build(benchmark, row, args, use_cuda, more)
    from fairseq_smoe.training.trainer import SMoETrainer  # once fairseq knows the plugin

    trainer = SMoETrainer(cfg, task, model, criterion)
    batch = made_up_batch(task.source_dictionary, args.tokens, args.seed)
    return lambda: trainer.train_step([batch], raise_oom=True)


# --------------------------------------------------------------------------------------
# options


def compare_options(args):
    """Compare every row with each set of options, and report time and memory relative to the row
    without them."""
    benchmark, rows, use_cuda = start(args)
    results = []
    with tqdm(total=len(rows) * len(args.options) * args.rounds, unit="round") as progress:
        for row in rows:
            progress.set_description(row.slug)
            stock_memory = peak_memory(args, row, "")
            stock = stepper(benchmark, row, args, use_cuda)
            for options in args.options:
                memory = peak_memory(args, row, options)
                ours = stepper(benchmark, row, args, use_cuda, shlex.split(options))
                low, median, high = quartiles(in_turns(ours, stock, args.rounds, progress))
                results.append(
                    {
                        "row": row.name,
                        "options": options,
                        "time": median,
                        "quartiles": [low, high],
                        "peak_mib": memory,
                        "stock_peak_mib": stock_memory,
                    }
                )
                del ours
                gc.collect()
            del stock
            gc.collect()
    title = f"{benchmark.title}, scale {args.scale}, {args.tokens} tokens a step"
    publish(as_markdown(results, title), args, {"results": results}, None)


def as_markdown(results, title):
    lines = [
        f"| {title} | options | time relative to none (quartiles) | peak MiB | peak MiB without |",
        "|---|---|---:|---:|---:|",
    ]
    for r in results:
        time, memory = told(r["time"], *r["quartiles"]), f"{r['peak_mib']} | {r['stock_peak_mib']}"
        lines.append(f"| {r['row']} | `{r['options']}` | {time} | {memory} |")
    return "\n".join(lines)


def peak_memory(args, row, options):
    """Peak memory in MiB of a process of its own that makes some steps: on a GPU what torch has
    allocated there, else the whole process's."""
    command = [sys.executable, __file__, f"--memory-of={options}", "--rows", row.slug]
    for name in ("benchmark", "scale", "tokens", "threads", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--cpu"] * args.cpu
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def print_peak_memory(args):
    benchmark, (row,), use_cuda = start(args)
    step = stepper(benchmark, row, args, use_cuda, shlex.split(args.memory_of))
    for _ in range(STEPS_FOR_MEMORY):
        step()
    if use_cuda:
        print(torch.cuda.max_memory_allocated() >> 20)
        return
    # not getrusage's maximum, which a process inherits from the one that has started it
    print(memory_kib()["VmHWM"] >> 10)


if __name__ == "__main__":
    main()
