"""The speed of the block compared with dense arithmetic and with one-hot dispatch.

Measures forward + backward of one block in training. The contestants take turns in one process:

* block: ``SMoEBlock`` as it is;
* dense: a dense FFN sublayer over as many rows as the block's experts process, i.e. the same FLOPs;
* products alone: the matrix products of the block's experts and nothing else (CPU);
* one-hot: the same block with GShard's dispatch, which multiplies with (tokens x experts x
  capacity) tensors;
* fairscale: its MOELayer, for a single stratum, if fairscale is installed;
* more experts: blocks with one stratum that differ only in the number of experts.

Prints medians of ratios. Efficiency is time of dense / time of block. The efficiency of the
products alone is the most that a loop over the experts can reach. For the others, the ratio says
how many times as long as the block they take. Also prints the peak memory of block and one-hot,
each measured in a separate process. Example:

    python scripts/bench_block.py --strata 8 4-4 2-2-2-2 4-12 --to results/bench_block

With --systems, compares the systems of docs/systems.md instead, see block_systems.py.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from benchmarking import add_common_options, in_turns, publish, quartiles, told
from block_contestants import DenseFFN, ExpertProducts, FairscaleFFN, OneHotBlock, kept_choices
from block_systems import SYSTEMS, measure_systems
from block_systems import as_markdown as systems_as_markdown
from process_memory import added_by
from tqdm import tqdm

from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_kinds.ffn import BACKENDS
from fairseq_smoe.moe.strata import parse_strata
from fairseq_smoe.translation.memory import keep_freed_memory

# with more tokens, one-hot dispatch takes up to a minute of a CPU: only one round
ONE_HOT_ALWAYS = 8000


def make_block(kind, args, strata):
    torch.manual_seed(args.seed)
    options = {"expert_backend": args.backend}
    block = kind(args.embed_dim, args.ffn_dim, parse_strata(strata), **options)
    return block.to(args.device, args.dtype).train()


def step(module, x):
    """Forward and backward as in training; returns what the module returned."""
    module.zero_grad(set_to_none=True)
    out = module(x)
    y, loss = (out[0], out[1].balance_loss) if isinstance(out, tuple) else (out, 0)
    (y.float().square().mean() + 0.01 * loss).backward()
    return out


def make_tokens(args, number):
    shape = number, args.embed_dim
    return torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True)


def measure(args, strata, tokens, progress):
    """Measure one layout with one number of tokens; returns a dict for the report."""
    block, one_hot = (make_block(kind, args, strata) for kind in (SMoEBlock, OneHotBlock))
    x = make_tokens(args, tokens)
    y, stats = step(block, x)
    few = args.rounds if tokens < ONE_HOT_ALWAYS or args.device == "cuda" else 1
    if few > 1 and args.dtype == torch.float32:  # bf16 sends some tokens to other experts
        torch.testing.assert_close(step(one_hot, x)[0], y, rtol=1e-3, atol=1e-4)
    rows = sum(len(kept_choices(gate)) for gate in stats.gates)
    dense = DenseFFN(args.embed_dim, args.ffn_dim).to(args.device, args.dtype)
    dense_x = make_tokens(args, rows)
    ours, theirs = (lambda: step(block, x)), (lambda: step(dense, dense_x))
    low, efficiency, high = quartiles(in_turns(theirs, ours, args.rounds, progress))
    products = None  # on a GPU one call multiplies for all experts
    if args.device == "cpu":
        products = statistics.median(in_turns(theirs, ExpertProducts(block, stats), args.rounds))
    result = {
        "strata": strata,
        "tokens": tokens,
        "rows": rows,
        "mean_passes": round(float(stats.passes.float().mean()), 3),
        "efficiency": efficiency,
        "efficiency_quartiles": [low, high],
        "products": products,
        "one_hot": times_as_long(ours, lambda: step(one_hot, x), few),
        "fairscale": None,
    }
    experts = len(block.experts.fc1_weight)
    if block.strata == (experts,) and importlib.util.find_spec("fairscale"):
        fairscale = FairscaleFFN(args.embed_dim, args.ffn_dim, experts)
        fairscale.to(args.device, args.dtype)
        even_x = make_tokens(args, tokens // experts * experts)
        result["fairscale"] = times_as_long(ours, lambda: step(fairscale, even_x), few)
    for name, module in (("block", block), ("one-hot", one_hot)):
        memory = None if args.no_memory else peak_memory(name, module, args, strata, tokens)
        result[f"{name}_peak_mib"] = memory
    return result


def times_as_long(ours, theirs, rounds):
    """None if the GPU's memory is too small for it."""
    try:
        return 1 / statistics.median(in_turns(ours, theirs, rounds, warm_up=rounds > 1))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def measure_experts(args, progress):
    """Time relative to the first number of experts: ``[{"experts", "time", "quartiles"}, ...]``"""
    x = make_tokens(args, args.experts_tokens)
    first = make_block(SMoEBlock, args, str(args.experts[0]))
    results = []
    for number in args.experts[1:]:
        more = make_block(SMoEBlock, args, str(number))
        ratios = in_turns(lambda: step(first, x), lambda: step(more, x), args.rounds, progress)
        low, time, high = quartiles([1 / ratio for ratio in ratios])
        results.append({"experts": number, "time": time, "quartiles": [low, high]})
    return results


def peak_memory(name, module, args, strata, tokens):
    """MiB that one step adds to the GPU's memory, or to a process: activations and gradients. None
    if the GPU's memory is too small. On the CPU, Linux only."""
    if args.device == "cuda":
        return peak_on_gpu(module, make_tokens(args, tokens))
    command = [sys.executable, __file__, "--memory-of", name, "--strata", strata, "--cpu"]
    for option in ("threads", "embed_dim", "ffn_dim", "backend"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    command += ["--tokens", str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_on_gpu(module, x):
    module.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(module, x)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return (torch.cuda.max_memory_allocated() - before) >> 20


def print_memory(args):
    """What a step adds to this process, which has done nothing else."""
    kind = {"block": SMoEBlock, "one-hot": OneHotBlock}[args.memory_of]
    block = make_block(kind, args, args.strata[0])
    step(block, make_tokens(args, 16))  # loads the libraries
    block.zero_grad(set_to_none=True)
    x = make_tokens(args, args.tokens[0])
    print(added_by(lambda: step(block, x)))


def as_markdown(results, experts, args):
    lines = [
        "| strata | tokens | mean passes | efficiency (quartiles) | products alone "
        "| one-hot takes | fairscale takes | peak MiB | one-hot peak MiB | ratio |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    ]
    for r in results:
        efficiency = told(r["efficiency"], *r["efficiency_quartiles"])
        one_hot, fairscale = (
            f"{r[name]:.1f}x" if r[name] else "" for name in ("one_hot", "fairscale")
        )
        products = f"{r['products']:.2f}" if r["products"] else ""
        ours, theirs = r["block_peak_mib"], r["one-hot_peak_mib"]
        memory = f"{ours} | out of memory |"
        if ours is None:
            memory = " |  | "
        elif theirs is not None:
            memory = f"{ours} | {theirs} | {ours / max(theirs, 1):.2f}"
        lines.append(
            f"| {r['strata']} | {r['tokens']} | {r['mean_passes']} "
            f"| {efficiency} | {products} "
            f"| {one_hot} | {fairscale} | {memory} |"
        )
    if experts:
        lines += ["", f"| experts, {args.experts_tokens} tokens | time (quartiles) |\n|---|---:|"]
        lines += [f"| {args.experts[0]} | 1 |"]
        for r in experts:
            lines.append(f"| {r['experts']} | {told(r['time'], *r['quartiles'])} |")
    return "\n".join(lines)


def draw(results, path):
    """Efficiency over the number of tokens, with one line per layout."""
    from fairseq_smoe.plots.style import COLOURS, bare, plt, save

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for strata, colour in zip(dict.fromkeys(r["strata"] for r in results), COLOURS):
        own = sorted((r for r in results if r["strata"] == strata), key=lambda r: r["tokens"])
        tokens, values = [r["tokens"] for r in own], [r["efficiency"] for r in own]
        spread = list(zip(*(r["efficiency_quartiles"] for r in own)))
        axes.plot(tokens, values, "o-", color=colour, label=strata)
        axes.fill_between(tokens, *spread, color=colour, alpha=0.15)
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("efficiency against a dense FFN")
    axes.set_ylim(bottom=0)
    axes.legend(title="strata", frameon=False)
    bare(axes)
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--strata", nargs="+", default=["8", "4-4", "2-2-2-2", "4-12"])
    add("--tokens", nargs="+", type=int, default=[1024, 4096, 13000])
    add("--experts", nargs="*", type=int, default=[8, 32, 128], help="if empty, not measured")
    add("--experts-tokens", type=int, default=8192, help="(default: %(default)s)")
    add("--embed-dim", type=int, default=512, help="(default: %(default)s)")
    add("--ffn-dim", type=int, default=2048, help="(default: %(default)s)")
    add_common_options(parser, rounds=7)
    add("--backend", choices=BACKENDS, default="auto", help="of the experts (default: %(default)s)")
    add("--no-memory", action="store_true", help="leave out the peak memory, which takes seconds")
    add("--systems", action="store_true", help="the systems of docs/systems.md, with 4096 tokens")
    add("--memory-of", choices=["block", "one-hot"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available() and not args.cpu
    args.device, args.dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    if args.memory_of:
        return print_memory(args)
    if not on_gpu:
        keep_freed_memory()  # as a training does
    if args.systems:
        with tqdm(total=args.rounds * len(SYSTEMS), unit="round") as progress:
            results = measure_systems(args, step, progress)
        return publish(systems_as_markdown(results), args, {"results": results}, None)
    cases = [(s, t) for s in args.strata for t in args.tokens]
    with tempfile.TemporaryDirectory() as folder:
        # fairscale needs a process group
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/x", rank=0, world_size=1)
        total = args.rounds * (len(cases) + max(len(args.experts) - 1, 0))
        with tqdm(total=total, unit="round") as progress:
            results = [measure(args, *case, progress) for case in cases]
            experts = measure_experts(args, progress) if args.experts else []
        dist.destroy_process_group()
    numbers = {"results": results, "experts": experts}
    table = as_markdown(results, experts, args)
    publish(table, args, numbers, lambda path: draw(results, path))


if __name__ == "__main__":
    main()
