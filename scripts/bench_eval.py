"""``python -m fairseq_smoe evaluate`` compared with ``fairseq-generate`` for each direction.

    python scripts/bench_eval.py CHECKPOINT DATA --sentences 200 --rounds 3

Takes the first sentences of a test set in DATA, for every direction that the model was trained on,
and translates them on the CPU in alternating rounds:

* ours: ``python -m fairseq_smoe evaluate``, all directions in one call, without scores;
* stock: ``fairseq-generate`` once per direction, with the same plugin and its own defaults.

Prints Markdown with medians, and checks that the translations are the same.
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder that prepare has made")
    parser.add_argument("--subset", default="test", help="(default: %(default)s)")
    parser.add_argument("--directions", help="comma list (default: those of the training)")
    parser.add_argument(
        "--sentences", type=int, default=200, help="of each direction (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        metavar="N",
        help="values of OMP_NUM_THREADS to measure, one after another (default: leave it as it is)",
    )
    parser.add_argument("--processes", type=int, help="of evaluate (default: its own default)")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all measurements in FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="keep the table in FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = [measure(args, Path(folder), threads) for threads in args.threads or [None]]
    table = format_table(results, args)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(table + "\n")


def measure(args, folder, threads):
    """``{"threads", "directions", "ours": [{"seconds", "cpu_seconds"}, ...], "stock": [...]}``"""
    data, run = folder / "data", folder / "run"
    directions = args.directions.split(",") if args.directions else trained_directions(args)
    if not data.exists():
        write_subset(args, data, directions)
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "checkpoint_best.pt").symlink_to(args.checkpoint.absolute())
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    result = {"threads": threads, "directions": directions, "ours": [], "stock": []}
    for number in range(args.rounds):
        print(f"threads {threads}, round {number + 1} of {args.rounds}", file=sys.stderr)
        shutil.rmtree(run / "evaluation", ignore_errors=True)
        result["ours"].append(timed(lambda: ours(args, data, run, directions, environment)))
        found = {}
        result["stock"].append(
            timed(lambda: found.update(stock(args, data, directions, environment)))
        )
        for direction, translations in found.items():
            path = run / "evaluation" / args.subset / f"{direction}.hyp.pieces"
            if path.read_text(encoding="utf-8").split("\n")[:-1] != translations:
                sys.exit(f"error: {direction}: the translations differ")
    return result


def trained_directions(args):
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.evaluation.saved_model import read_saved_model, trained_directions

    return trained_directions(read_saved_model(args.checkpoint))


def write_subset(args, target, directions):
    """Write a data folder with only the first sentences of the test set."""
    from fairseq.data import indexed_dataset

    from fairseq_smoe.translation.data_manager import find_pairs, pair_of

    target.mkdir()
    for path in [*args.data.glob("dict.*.txt"), args.data / "langs.txt"]:
        shutil.copy(path, target)
    present = find_pairs(args.data, args.subset)
    for pair in {pair_of(direction, present) for direction in directions}:
        for language in pair.split("-"):
            name = f"{args.subset}.{pair}.{language}"
            source = indexed_dataset.MMapIndexedDataset(str(args.data / name))
            builder = indexed_dataset.MMapIndexedDatasetBuilder(
                str(target / f"{name}.bin"), dtype=source._index.dtype
            )
            for i in range(min(args.sentences, len(source))):
                builder.add_item(source[i])
            builder.finalize(str(target / f"{name}.idx"))


def ours(args, data, run, directions, environment):
    command = [
        *(sys.executable, "-m", "fairseq_smoe", "evaluate", "--run", str(run), "--cpu"),
        *("--data", str(data), "--directions", ",".join(directions), "--no-score"),
        *("--subset", args.subset),
        *(("--processes", str(args.processes)) if args.processes else ()),
    ]
    check_output(command, environment)


def stock(args, data, directions, environment):
    """``{direction: [best translation, in pieces]}``"""
    import fairseq_smoe

    found = {}
    for direction in directions:
        source, target = direction.split("-")
        output = check_output(
            [
                *(str(Path(sys.executable).parent / "fairseq-generate"), str(data), "--cpu"),
                *("--user-dir", str(Path(fairseq_smoe.__file__).parent)),
                *("--task", "smoe_translation", "--source-lang", source, "--target-lang", target),
                *("--path", str(args.checkpoint), "--gen-subset", args.subset),
            ],
            environment,
        )
        lines = re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", output, re.MULTILINE)
        found[direction] = [text for _, text in sorted((int(n), text) for n, text in lines)]
    return found


def check_output(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def timed(function):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu}


def format_table(results, args):
    lines = [
        f"Medians of {args.rounds} alternating rounds: {len(results[0]['directions'])} directions "
        f"of {args.sentences} sentences, {len(os.sched_getaffinity(0))} cores.",
        "",
        "| OMP_NUM_THREADS | ours, s | fairseq-generate, s | ratio | ours, CPU s "
        "| fairseq-generate, CPU s | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [str(result["threads"] or os.environ.get("OMP_NUM_THREADS", "not set"))]
        for what in ("seconds", "cpu_seconds"):
            sides = [[r[what] for r in result[side]] for side in ("ours", "stock")]
            ratio = statistics.median(b / a for a, b in zip(*sides))
            cells += [f"{statistics.median(side):.1f}" for side in sides] + [f"{ratio:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
