"""What weights in 8 bits cost a trained model in BLEU, and what they save.

Translates the held-out text of the model's data folder with weights in float32 and in 8 bits in
turns, and scores both with sacrebleu. Memory is what loading the model adds to a fresh process.
Example:

    python scripts/bench_int8.py runs/smoe/checkpoints/checkpoint_best.pt --data data/m4
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import sacrebleu
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fairseq_smoe import Translator  # noqa: E402

DTYPES = ("float32", "int8")
MEMORY = """
import sys; from fairseq_smoe import Translator
def now(): return int(open("/proc/self/statm").read().split()[1]) * 4096
from fairseq_smoe.evaluation import set_up_fairseq; set_up_fairseq()
import fairseq_smoe.inference.translator, gc, ctypes
before = now(); kept = Translator.load(*sys.argv[1:3], dtype=sys.argv[3], threads=1)
gc.collect(); ctypes.CDLL(None).malloc_trim(0); print(now() - before)
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint or folder of a training")
    parser.add_argument("--data", type=Path, required=True, help="output of prepare")
    parser.add_argument("--subset", default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--sentences", type=int, default=500, help="of each direction (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    args = parser.parse_args()
    translators = {
        kind: Translator.load(args.model, args.data, threads=args.threads, dtype=kind)
        for kind in DTYPES
    }
    scores, ratios, same, number = {kind: [] for kind in DTYPES}, [], 0, 0
    for source, target in tqdm(translators["float32"].directions, unit="direction"):
        sources, references = read(args, source, target), read(args, target, source)
        lines, seconds = {}, {}
        for kind, translator in translators.items():
            begun = time.perf_counter()
            lines[kind] = [r.text for r in translator.translate(sources, source, target)]
            seconds[kind] = time.perf_counter() - begun
            bleu = sacrebleu.corpus_bleu(lines[kind], [references])
            scores[kind].append(bleu.score)
        ratios.append(seconds["float32"] / seconds["int8"])
        same += sum(a == b for a, b in zip(*lines.values()))
        number += len(sources)
    print("| weights | BLEU, mean of directions | memory of the model, MB |\n|---|---:|---:|")
    for kind in DTYPES:
        print(f"| {kind} | {mean(scores[kind]):.2f} | {memory(args, kind) / 1e6:.0f} |")
    apart = max(abs(a - b) for a, b in zip(*scores.values()))
    print(
        f"\n{number} sentences, {same / number:.0%} translated the same; no direction is further "
        f"apart than {apart:.2f} BLEU. int8 is {median(ratios):.2f} times as fast (median of "
        "directions, which take turns)"
    )


def read(args, language, other):
    for pair in (f"{language}-{other}", f"{other}-{language}"):
        path = args.data / f"{args.subset}.{pair}.{language}.txt"
        if path.is_file():
            return path.read_text().splitlines()[: args.sentences]
    sys.exit(f"error: --subset {args.subset}: {args.data} has no text of {language}-{other}")


def memory(args, kind):
    command = [sys.executable, "-c", MEMORY, args.model, args.data, kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
