"""Binarising compared with fairseq's own two steps, on the same text with the same vocabulary.

    python scripts/bench_data.py TEXT --pair eng-cat --lines 250000 1000000

TEXT holds train.eng-cat.eng and train.eng-cat.cat. If they have fewer lines than --lines, the lines
are repeated. For every size, in alternating rounds:

* ours: ``python -m fairseq_smoe prepare --steps encode binarise``;
* stock: SentencePiece pieces as text (in batches, both sides at the same time: faster than the
  usual script, which goes line by line), then ``fairseq-preprocess``.

Both use --workers processes. Prints Markdown with medians, and checks that the files are the same.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

VALID_LINES = 100
PIECES = """
import sys
from itertools import islice

import sentencepiece

model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
for source, target in zip(sys.argv[2::2], sys.argv[3::2]):
    with open(source, newline="\\n") as lines, open(target, "w") as out:
        while block := [line.rstrip("\\n") for line in islice(lines, 50000)]:
            for pieces in model.encode(block, out_type=str, num_threads=1):
                out.write(" ".join(pieces) + "\\n")
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--pair", default="eng-cat", help="(default: %(default)s)")
    parser.add_argument("--lines", type=int, nargs="+", default=[250_000], metavar="N")
    parser.add_argument("--vocab-size", type=int, default=32000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all measurements in FILE")
    args = parser.parse_args()
    results = [measure(args, lines) for lines in args.lines]
    print_table(results, args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(args, lines):
    """``{"lines": N, "ours": [{"seconds", "peak_mib"}, ...], "stock": [...]}``"""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        prepare = prepare_command(args, lines, folder)
        run([*prepare, "--steps", "fetch", "verify", "clean", "sentencepiece"])
        result = {"lines": lines, "ours": [], "stock": []}
        for number in range(args.rounds):
            print(f"{lines} lines, round {number + 1} of {args.rounds}", file=sys.stderr)
            result["ours"].append(
                run([*prepare, "--redo", "encode", "--steps", "encode", "binarise"])
            )
            shutil.rmtree(folder / "stock", ignore_errors=True)
            result["stock"].append(run(stock_command(args, folder)))
        for path in sorted((folder / "stock" / "bin").glob("*.[bi][id][nx]")):
            if not filecmp.cmp(path, folder / "ours" / path.name, shallow=False):
                sys.exit(f"error: {path.name} differs")
        return result


def prepare_command(args, lines, folder):
    text = folder / "text"
    text.mkdir()
    for lang in args.pair.split("-"):
        path = args.text / f"train.{args.pair}.{lang}"
        with open(path, "rb") as source, open(text / path.name, "wb") as target:
            target.writelines(islice(cycle(source.readlines()), lines))
        with open(path, "rb") as source:
            head = list(islice(source, VALID_LINES))
        (text / f"valid.{args.pair}.{lang}").write_bytes(b"".join(head))
    return [
        *(sys.executable, "-m", "fairseq_smoe", "prepare", "--from", str(text)),
        *("--to", str(folder / "ours"), "--pairs", args.pair, "--workers", str(args.workers)),
        *("--vocab-size", str(args.vocab_size), "--sample-lines", "200000"),
        *("--held-out", "keep", "--duplicates", "keep"),
    ]


def stock_command(args, folder):
    """A shell command that does what users of fairseq do, from the same cleaned text."""
    ours, stock = folder / "ours", folder / "stock"
    stock.mkdir()
    (stock / "pieces.py").write_text(PIECES)
    sides = args.pair.split("-")
    encode = []
    for lang in sides:
        names = [f"{split}.{args.pair}.{lang}" for split in ("train", "valid")]
        files = " ".join(f"{ours}/work/clean/{name} {stock}/{name}" for name in names)
        encode.append(f"{sys.executable} {stock}/pieces.py {ours}/spm.model {files} & ")
    return [
        *("bash", "-ec"),
        f"{''.join(encode)} wait; {Path(sys.executable).parent}/fairseq-preprocess "
        f"--source-lang {sides[0]} --target-lang {sides[1]} --srcdict {ours}/dict.txt "
        f"--tgtdict {ours}/dict.txt --trainpref {stock}/train.{args.pair} "
        f"--validpref {stock}/valid.{args.pair} --destdir {stock}/bin --workers {args.workers}",
    ]


def run(command):
    """Elapsed seconds, and peak memory of the largest process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed:\n{log.decode()[-2000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "peak_mib": usage.ru_maxrss / 1024,  # of the process or any it waited for
    }


def print_table(results, args):
    print(f"Medians of {args.rounds} alternating rounds, {args.workers} processes, {args.pair}.\n")
    print("| pairs of lines | ours, lines/s | stock, lines/s | ratio | ours, MiB | stock, MiB |")
    print("|---:|---:|---:|---:|---:|---:|")
    for result in results:
        middle = {
            (side, what): statistics.median(r[what] for r in result[side])
            for side in ("ours", "stock")
            for what in ("seconds", "peak_mib")
        }
        speed = {s: 2 * result["lines"] / middle[s, "seconds"] for s in ("ours", "stock")}
        ratio = statistics.median(
            stock["seconds"] / ours["seconds"]
            for ours, stock in zip(result["ours"], result["stock"])
        )
        print(
            f"| {result['lines']:,} | {speed['ours']:,.0f} | {speed['stock']:,.0f} | {ratio:.1f} "
            f"| {middle['ours', 'peak_mib']:.0f} | {middle['stock', 'peak_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
