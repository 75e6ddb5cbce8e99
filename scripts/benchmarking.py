"""What the benchmarks have in common: building the rows of a table, taking turns, reporting."""

import argparse
import datetime
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fairseq_smoe  # noqa: E402
from fairseq_smoe.accounting.flops import count_row  # noqa: E402
from fairseq_smoe.benchmarks import benchmark as benchmarks  # noqa: E402
from fairseq_smoe.benchmarks.scale import SCALES  # noqa: E402
from fairseq_smoe.diagnosis.machine import GIB, processor  # noqa: E402
from fairseq_smoe.diagnosis.untrained import untrained_model  # noqa: E402


def make_parser(doc, **defaults):
    """A parser with the options that all benchmarks have.

    Args:
        doc: docstring of the script.
        defaults: default values of ``tokens`` and ``rounds``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_model_options(parser, defaults["rounds"])
    add("--rows", nargs="+", metavar="ROW", help="(default: all)")
    add("--tokens", type=int, default=defaults["tokens"], help="(default: %(default)s)")
    return parser


def add_model_options(parser, rounds):
    """Add the options that choose the size of models."""
    add = parser.add_argument
    add_common_options(parser, rounds)
    add("--benchmark", choices=benchmarks.NAMES, default="m4", help="(default: %(default)s)")
    add("--scale", choices=SCALES, default="paper", help="(default: %(default)s)")


def add_common_options(parser, rounds):
    """Add the options that the benchmark of the block has as well."""
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help="turns per contestant (default: %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    add("--cpu", action="store_true", help="do not use a GPU even if there is one")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--to", type=Path, metavar="DIR", help="write results.json, table.md and a picture there")


def compare_rows(args, make_job, what):
    """Compare every row with the dense model, and report the results.

    Args:
        make_job: ``make_job(benchmark, row, args, use_cuda)`` returns a function to time.
        what: what the function does, for the title.
    """
    benchmark, rows, use_cuda = start(args)
    dense, dense_memory = with_memory(
        lambda: make_job(benchmark, benchmark.rows[0], args, use_cuda)
    )
    results, dense_seconds = [], []
    with tqdm(total=len(rows) * args.rounds, unit="round") as progress:
        for row in rows:
            progress.set_description(row.slug)
            other, memory = with_memory(lambda: make_job(benchmark, row, args, use_cuda))
            times = times_in_turns(dense, other, args.rounds, progress)
            dense_seconds += [theirs for theirs, _ in times]
            result = measured(benchmark, row, args, [theirs / ours for theirs, ours in times])
            results.append(result | on_this_gpu(args, memory, [ours for _, ours in times]))
            del other
            gc.collect()
    own = on_this_gpu(args, dense_memory, dense_seconds)
    report(results, args, f"{benchmark.title}, scale {args.scale}, {what}", own)


def with_memory(make_job):
    """``(job, GiB)``: a function to time, and the most memory of the GPU that the first two calls
    of it need, model included; None without a GPU."""
    if not torch.cuda.is_available():
        return make_job(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job = make_job()
    for _ in range(2):  # the first makes the state of the optimizer
        job()
    return job, (torch.cuda.max_memory_allocated() - before) / GIB


def on_this_gpu(args, memory, seconds):
    """What is worth knowing of a GPU and not of a CPU, whose speed depends on what else it does."""
    if args.cpu or memory is None:
        return {}
    return {"tokens_per_second": args.tokens / statistics.median(seconds), "peak_gib": memory}


def start(args):
    """Set up fairseq and torch.

    Returns:
        ``(benchmark, rows except the dense one, use_cuda)``
    """
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    fairseq_smoe.register()
    torch.set_num_threads(args.threads)
    benchmark = benchmarks.load(args.benchmark)
    rows = [benchmark.row(name) for name in args.rows] if args.rows else benchmark.rows[1:]
    return benchmark, rows, torch.cuda.is_available() and not args.cpu


def build(benchmark, row, args, use_cuda, more=()):
    """What fairseq-train builds for a row's command: ``(cfg, task, model, criterion)``.

    Args:
        more: further words of the command line.
    """
    more = ["--bf16" if use_cuda else "--cpu", *more]
    return untrained_model(benchmark, row, args.scale, args.tokens, args.seed, more)


def in_turns(dense, other, rounds, progress=None, warm_up=True):
    """Ratios of times, ``dense()`` / ``other()``. Each run of ``other`` is compared with the mean
    of the runs of ``dense`` before and after it."""
    times = times_in_turns(dense, other, rounds, progress, warm_up)
    return [theirs / ours for theirs, ours in times]


def times_in_turns(dense, other, rounds, progress=None, warm_up=True):
    """``[(seconds of dense, seconds of other), ...]``, as for :func:`in_turns`."""
    times = []
    for job in (dense, other) if warm_up else ():
        job()
    before = seconds(dense)
    for _ in range(rounds):
        ours, after = seconds(other), seconds(dense)
        times.append(((before + after) / 2, ours))
        before = after
        if progress is not None:
            progress.update()
    return times


def seconds(job):
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begun = time.perf_counter()
    job()
    wait()
    return time.perf_counter() - begun


def measured(benchmark, row, args, ratios):
    """A row of the report: speed relative to dense, FLOPs relative to dense, and their product."""
    flops = {r.slug: count_row(benchmark, r, args.scale)[1] for r in (benchmark.rows[0], row)}
    flop_ratio = flops[row.slug] / flops[benchmark.rows[0].slug]
    low, median, high = quartiles(ratios)
    return {
        "row": row.name,
        "speed": median,
        "flops": flop_ratio,
        "efficiency": median * flop_ratio,
        "quartiles": [low * flop_ratio, high * flop_ratio],
    }


def quartiles(values):
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def told(median, low, high):
    """A median with its quartiles, for a table."""
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def report(results, args, title, dense):
    """Print a table of the results of :func:`measured`; with ``--to``, also write it to files.

    Args:
        dense: result of :func:`on_this_gpu` for the dense model.
    """
    gpu = "| tokens/s | peak GiB " if dense else ""
    lines = [
        f"| {title} | tokens per second relative to dense | FLOPs relative to dense "
        f"| efficiency (quartiles) {gpu}|\n|---|---:|---:|---:|{'---:|---:|' if dense else ''}"
    ]
    if dense:
        lines.append(f"| Dense | 1 | 1 | 1 {_gpu_cells(dense)}|")
    for r in results:
        efficiency = told(r["efficiency"], *r["quartiles"])
        cells = f"{r['speed']:.3f} | {r['flops']:.3f} | {efficiency} {_gpu_cells(r)}"
        lines.append(f"| {r['row']} | {cells}|")
    numbers = {"results": results, "dense": dense}
    publish("\n".join(lines), args, numbers, lambda path: draw(results, title, path))


def _gpu_cells(result):
    if "peak_gib" not in result:
        return ""
    return f"| {result['tokens_per_second']:.0f} | {result['peak_gib']:.1f} "


def publish(table, args, numbers, draw_to):
    """Print a table; with ``--to``, also write the table, the numbers and a picture to files.

    Args:
        numbers: dict for results.json, which also gets the machine and the settings.
        draw_to: function that draws the picture, called with its path; None for no picture.
    """
    print(table)
    if args.to is None:
        return
    args.to.mkdir(parents=True, exist_ok=True)
    (args.to / "table.md").write_text(table + "\n")
    hidden = ("to", "memory_of", "dtype", "checkpoint", "data", "work", "source")  # paths and such
    settings = {name: value for name, value in vars(args).items() if name not in hidden}
    facts = {**machine(), "settings": settings, **numbers}
    (args.to / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    if draw_to is not None:
        draw_to(args.to / "efficiency.png")


def machine():
    """Date, processor, number of cores, GPU and torch's version."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def draw(results, title, path):
    """Bars of efficiency with quartiles, and a line at the efficiency of the dense model."""
    from fairseq_smoe.plots.style import bare, plt, save

    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.4 * len(results)), layout="constrained")
    names = [r["row"] for r in results]
    values = [r["efficiency"] for r in results]
    spread = list(
        zip(*((v - r["quartiles"][0], r["quartiles"][1] - v) for v, r in zip(values, results)))
    )
    axes.barh(names, values, xerr=spread, color="#0072b2", height=0.6, error_kw={"capsize": 3})
    axes.axvline(1, color="#888888", linewidth=1, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("speed x FLOPs, relative to the dense model")
    axes.set_title(title, loc="left")
    bare(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    save(figure, path)
