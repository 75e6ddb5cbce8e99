"""How many tokens a training step can take on this GPU (fairseq-train's --max-tokens).

Doubles the tokens until the GPU's memory is too small, and prints tokens per second and the peak
memory of each size. A step is a whole step of the trainer in bfloat16, on made-up sentences of 10
to 50 words. Without a GPU there is no end to the memory, so give --most. Example:

    python scripts/largest_batch.py --row smoe-2-2-2-2
    python scripts/largest_batch.py --benchmark m15 --row smoe-4-12 --least 1024
"""

import argparse
import gc
import statistics

import torch
from bench_train import stepper
from benchmarking import add_model_options, on_this_gpu, publish, seconds, start, with_memory

from fairseq_smoe.text_table import aligned


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_options(parser, rounds=5)
    add("--row", default="smoe-2-2-2-2", help="(default: %(default)s)")
    add("--least", type=int, default=4096, help="tokens to begin with (default: %(default)s)")
    add("--most", type=int, default=2**20, help="tokens to end with (default: %(default)s)")
    args = parser.parse_args()
    args.rows = [args.row]
    benchmark, (row,), use_cuda = start(args)
    results, args.tokens = [], args.least
    while args.tokens <= args.most:
        result = measure(benchmark, row, args, use_cuda)
        results.append({"tokens": args.tokens, **result})
        if not result:
            break
        args.tokens *= 2
    rows = [
        (str(r["tokens"]), *(cells(r) if len(r) > 1 else ("out of memory", ""))) for r in results
    ]
    title = f"{benchmark.title}, {row.name}, scale {args.scale}: --max-tokens"
    table = "\n".join(aligned((title, "tokens/s", "peak GiB"), rows, left=0))
    publish(table, args, {"results": results}, None)


def measure(benchmark, row, args, use_cuda):
    """Speed and memory with ``args.tokens``; {} if the GPU's memory is too small."""
    try:
        job, memory = with_memory(lambda: stepper(benchmark, row, args, use_cuda))
        times = [seconds(job) for _ in range(args.rounds)]
    except torch.OutOfMemoryError:
        return {}
    finally:
        job = None
        gc.collect()
        if use_cuda:
            torch.cuda.empty_cache()
    return on_this_gpu(args, memory, times) or {"seconds": statistics.median(times)}


def cells(result):
    if "peak_gib" not in result:
        return f"{result['tokens'] / result['seconds']:.0f}", ""
    return f"{result['tokens_per_second']:.0f}", f"{result['peak_gib']:.1f}"


if __name__ == "__main__":
    main()
