"""Measures the conversions on real text: results/convert/README.md.

    python scripts/convert_results.py --data data/convert --runs runs/convert
    python scripts/convert_results.py --data ... --runs ... --part moefy     one part of the report
    python scripts/convert_results.py --only-tables                          from the CSV files

Trains a dense and a vanilla model (results/convert/convert-m4.json), converts them, translates
held-out text with every model that comes out of it, and writes one CSV file for every part into
results/convert/, with curves.csv for the validation losses of all trainings. The command can be
stopped and run again: what is done is skipped, also if the run folders are gone and only the lines of
the CSV files are left.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from result_files import markdown, read_csv, write_csv

from fairseq_smoe.plots.train_log import read_log

RESULTS = Path(__file__).resolve().parent.parent / "results" / "convert"
BENCHMARK = RESULTS / "convert-m4.json"
VARIANTS = RESULTS / "variants.json"
SUBSET = "test1"  # held-out text of the training sources; test is Flores
METRICS = ("bleu", "chrf++")
COLUMNS = (
    *("variant", "source", "convert", "train", "evaluate", "updates", "parameters"),
    *("loss", *METRICS, "difference", "p"),
)
MEAN = "mean of all"  # of a table of directions
ROWS = ("dense", "vanilla-moe")  # of the benchmark
NUMBERS = {"bleu": 2, "chrf++": 1, "difference": 2}


@dataclass(frozen=True)
class Variant:
    """A model to evaluate: an entry of variants.json.

    Attributes:
        part: of the report.
        name: of the variant, and of its run folder.
        source: row of the benchmark that it is made from, or another variant of the part, which
            stands before it.
        convert: words behind ``convert``: the kind, and its options.
        train: options of fairseq-train to train the result on with, in addition to those of the
            benchmark; empty for not at all.
        evaluate: words of options of ``evaluate``.
        baseline: variant of the part that its BLEU is tested against.
    """

    part: str
    name: str
    source: str
    convert: str = ""
    train: str = ""
    evaluate: tuple = ()
    baseline: str = ""


class Report:
    """All that is measured.

    Args:
        data: output of prepare.
        runs: folder of all run folders.
        directions: to translate; empty for all.
    """

    def __init__(self, data, runs, directions):
        self.data, self.runs, self.directions = data, runs, directions
        self.variants = [Variant(**entry) for entry in json.loads(VARIANTS.read_text())]

    def train_rows(self, parts):
        """Train the models that some parts start from."""
        sources = {v.source for v in self.variants if v.part in parts}
        for row in ROWS:
            if row in sources and not self._is_trained(row):
                run("train", BENCHMARK, row, "--data", self.data, "--run", self.runs / row, "--cpu",
                    "--max-tokens", "2000")  # fmt: skip

    def _is_trained(self, row):
        log = self.runs / row / "train.log"
        return log.exists() and "done training in" in log.read_text(errors="replace")

    def measure(self, part):
        """Measure every variant of a part that has no line in the CSV file yet."""
        lines = {line["variant"]: line for line in read_lines(part)}
        variants = [v for v in self.variants if v.part == part]
        for variant in variants:
            if variant.name not in lines:
                print(f"== {part}: {variant.name}", flush=True)
                lines[variant.name] = self._line(variant)
                write_lines(part, [lines[v.name] for v in variants if v.name in lines])

    def checkpoint(self, name, part):
        """The checkpoint of a row of the benchmark, or of a variant of the part."""
        variant = self.find(part, name)
        if variant is None:
            return self.runs / name / "checkpoints" / "checkpoint_last.pt"
        if variant.train:
            return self.folder(variant) / "checkpoints" / "checkpoint_last.pt"
        if variant.convert:
            return self.folder(variant) / "converted.pt"
        return self.checkpoint(variant.source, part)

    def find(self, part, name):
        """The variant of that name; None for a row of the benchmark."""
        return next((v for v in self.variants if (v.part, v.name) == (part, name)), None)

    def folder(self, variant):
        return self.runs / variant.part / variant.name

    def _line(self, variant):
        folder = self.folder(variant)
        folder.mkdir(parents=True, exist_ok=True)
        converted = folder / "converted.pt"
        if variant.convert and not converted.exists():
            kind, *options = variant.convert.split()
            run("convert", kind, self.checkpoint(variant.source, variant.part), converted, *options)
        if variant.train:
            self._train_on(variant)
        checkpoint = self.checkpoint(variant.name, variant.part)
        run(
            *("evaluate", "--run", folder, "--checkpoint", checkpoint, "--data", self.data),
            *("--subset", SUBSET, "--cpu", "--processes", "1", "--max-len-b", "100"),
            *("--metrics", *METRICS, *variant.evaluate),
            *(("--directions", self.directions) if self.directions else ()),
        )
        return self._read(variant, checkpoint)

    def _train_on(self, variant):
        """Train on, with the options of the model that is trained on."""
        row, start = self._model(variant)
        run(
            *("train", BENCHMARK, row, "--data", self.data, "--run", self.folder(variant), "--cpu"),
            *("--max-tokens", "2000", *start, *variant.train.split()),
        )

    def _model(self, variant):
        """The row of the benchmark that a variant goes back to, and the options that make its model
        of that, with the checkpoint to begin with."""
        folder = self.folder(variant)
        if variant.convert:
            report = json.loads((folder / "converted.report.json").read_text())
            row, _ = self._model(replace(variant, convert=""))
            begin = ["--finetune-from-model", folder / "converted.pt"]
            return row, [*begin, *shlex.split(report["training_options"])]
        parent = self.find(variant.part, variant.source)
        if parent is None:
            start = self.checkpoint(variant.source, variant.part)
            return variant.source, ["--finetune-from-model", start]
        return self._model(parent)

    def _read(self, variant, checkpoint):
        folder = self.folder(variant) / "evaluation" / SUBSET
        scores = json.loads((folder / "scores.json").read_text())
        directions = scores["directions"].values()
        found = {m: mean(d[m] for d in directions) for m in METRICS}
        facts = json.loads(run("checkpoint", "inspect", "--json", checkpoint, output=True))
        (facts,) = facts.values()
        found |= self._tested(variant)
        found["loss"] = self._loss(variant)
        found |= {
            "variant": variant.name,
            "source": variant.source,
            "convert": variant.convert,
            "train": variant.train,
            "evaluate": " ".join(variant.evaluate),
            "updates": facts["updates"],
            "parameters": facts["parameters"],
        }
        return {name: rounded(name, found.get(name, "")) for name in COLUMNS}

    def _loss(self, variant):
        """Validation loss at the end of a training, in bits a token."""
        losses = valid_losses(self.folder(variant)) if variant.train else None
        return losses[max(losses)] if losses else ""

    def write_curves(self):
        """Validation losses of the rows and of all variants that are trained on, in bits a token,
        against the updates of each training. Lines of run folders that are gone are kept."""
        curves = {}
        for line in read_lines("curves"):
            curves.setdefault(line["training"], []).append(line)
        folders = {row: self.runs / row for row in ROWS}
        folders |= {v.name: self.folder(v) for v in self.variants if v.train}
        for name, folder in folders.items():
            if (folder / "train.log").exists():
                curves[name] = [
                    {"training": name, "updates": updates, "loss": loss}
                    for updates, loss in valid_losses(folder).items()
                ]
        lines = [line for curve in curves.values() for line in curve]
        write_lines("curves", lines, ("training", "updates", "loss"))

    def _tested(self, variant):
        """Difference to the baseline in mean BLEU, and the p value of the paired bootstrap."""
        if not variant.baseline:
            return {}
        baseline = self.folder(self.find(variant.part, variant.baseline))
        table = self.folder(variant) / "tested"
        run(
            *("tabulate", baseline, self.folder(variant), "--subset", SUBSET, "--metric", "bleu"),
            *("--baseline", baseline.name, "--to", table, "--format", "csv"),
        )
        lines = read_csv(table / "table.csv")
        first, second = (line for line in lines if line["column"] == MEAN)
        return {
            "difference": float(second["ours"]) - float(first["ours"]),
            "p": second["p_value"],
        }


def run(*words, output=False):
    """Run a command of fairseq_smoe, stop where it fails."""
    command = [sys.executable, "-m", "fairseq_smoe", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with exit code {done.returncode}")
    return done.stdout if output else None


def valid_losses(folder):
    """``{updates: validation loss in bits a token}`` of a training."""
    records = read_log(folder / "train.log").get("valid", {})
    return {updates: record["valid_nll_loss"] for updates, record in records.items()}


def mean(numbers):
    numbers = [n["score"] if isinstance(n, dict) else n for n in numbers]
    return sum(numbers) / len(numbers)


def rounded(name, value):
    return f"{value:.{NUMBERS[name]}f}" if name in NUMBERS and value != "" else value


def csv_file(name):
    return RESULTS / f"{name}.csv"


def read_lines(name):
    return read_csv(csv_file(name))


def write_lines(name, lines, columns=COLUMNS):
    write_csv(csv_file(name), columns, lines)


def table(part):
    """The lines of a part as Markdown, without columns that are empty everywhere."""
    lines = read_lines(part)
    hidden = {"source", "convert", "train", "evaluate"}
    names = [c for c in COLUMNS if c not in hidden and any(line[c] for line in lines)]
    return markdown(names, [[line[name] for name in names] for line in lines])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="output of prepare")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="run folders")
    parser.add_argument("--part", action="append", help="only this part; may be repeated")
    parser.add_argument("--directions", default="", metavar="A-B,...", help="(default: all)")
    parser.add_argument("--only-tables", action="store_true", help="measure nothing")
    args = parser.parse_args()
    report = Report(args.data, args.runs, args.directions)
    parts = list(dict.fromkeys(v.part for v in report.variants))
    for part in args.part or ():
        if part not in parts:
            parser.error(f"--part {part}: expected {', '.join(parts)}")
    if not args.only_tables:
        if args.data is None or args.runs is None:
            parser.error("give --data and --runs, or --only-tables")
        report.train_rows(args.part or parts)
        for part in args.part or parts:
            report.measure(part)
        report.write_curves()
    for part in parts:
        if read_lines(part):
            print(f"\n{part}\n\n{table(part)}")


if __name__ == "__main__":
    main()
