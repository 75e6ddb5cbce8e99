"""Where the time of a block goes, part by part: forward and backward in training, or decoding.

Sums the time of torch's operators over some steps on the CPU, and groups the operators into parts.
Time outside all operators counts as Python and the bookkeeping of autograd. Example:

    python scripts/profile_block.py --strata 2-2-2-2 --tokens 4096
    python scripts/profile_block.py --strata 2-2-2-2 --tokens 160 --decode
"""

import argparse
import os
import time

import torch
from bench_block import make_block, make_tokens, step
from torch.profiler import ProfilerActivity, profile

from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_kinds.ffn import BACKENDS

# prefixes of operators' names; the first part that matches counts
PARTS = {
    "experts' products": ("aten::addmm", "aten::mm", "aten::_grouped_mm", "aten::baddbmm"),
    "experts' activation, biases' gradients": (
        "aten::relu",
        "aten::clamp_min",
        "aten::threshold",
        "aten::sum",
    ),
    "norm": ("aten::native_layer_norm",),
    "gate: logits, softmax, choice": (
        "aten::linear",
        "aten::_softmax",
        "aten::topk",
        "aten::gather",
        "aten::scatter",
        "aten::div",
        "aten::t",
    ),
    "sort": ("aten::sort", "aten::argsort", "aten::cumsum", "aten::arange", "aten::remainder"),
    "gather and combine": ("aten::index", "aten::cat", "aten::mul", "aten::nonzero", "aten::where"),
    "memory: fill, copy, add": (
        "aten::fill",
        "aten::zero",
        "aten::copy",
        "aten::add",
        "aten::empty",
    ),
}
OTHER, OUTSIDE = "other operators", "Python, autograd"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--strata", default="2-2-2-2", help="(default: %(default)s)")
    add("--tokens", type=int, default=4096, help="(default: %(default)s)")
    add("--embed-dim", type=int, default=512, help="(default: %(default)s)")
    add("--ffn-dim", type=int, default=2048, help="(default: %(default)s)")
    add("--decode", action="store_true", help="forward only, in evaluation")
    add("--steps", type=int, default=10, help="(default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--backend", choices=BACKENDS, default="auto", help="(default: %(default)s)")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    args.device, args.dtype = "cpu", torch.float32
    torch.set_num_threads(args.threads)
    block = make_block(SMoEBlock, args, args.strata)
    x = make_tokens(args, args.tokens)
    if args.decode:
        block.eval()

    def job():
        for _ in range(args.steps):
            with torch.inference_mode(args.decode):
                block(x) if args.decode else step(block, x)

    job()
    begun = time.perf_counter()
    job()
    seconds = time.perf_counter() - begun
    with profile(activities=[ProfilerActivity.CPU]) as found:
        job()
    parts = dict.fromkeys([*PARTS, OTHER], 0.0)
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            parts[part_of(event.key)] += event.self_cpu_time_total / 1e6
    # the profiler itself takes time, so time outside operators is computed from the run without it
    parts[OUTSIDE] = max(0.0, seconds - sum(parts.values()))
    whole = sum(parts.values())
    print(f"| part, {args.strata}, {args.tokens} tokens | share of {seconds / args.steps:.4f} s |")
    print("|---|---:|")
    for part, taken in parts.items():
        print(f"| {part} | {100 * taken / whole:.1f}% |")


def part_of(name):
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), OTHER)


if __name__ == "__main__":
    main()
