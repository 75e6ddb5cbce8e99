"""Runs the trainings of the study (results/study/PLAN.md) one by one, and collects their losses.

    python scripts/study.py --data data/study-m4 --runs runs/study            all that are not done
    python scripts/study.py --data ... --runs ... --group rate                one step of the plan
    python scripts/study.py --runs runs/study --only-collect                  only write the CSV files

The command can be stopped and run again: it skips finished trainings and resumes interrupted ones.
After every training, the losses of its group are written to results/study/losses-GROUP.csv.
"""

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

STUDY = Path(__file__).resolve().parent.parent / "results" / "study"
COLUMNS = (
    *("row", "seed", "lr", "updates", "kind", "loss", "nll_loss", "target_tokens", "seconds"),
    *("encoder_capacity", "decoder_capacity"),
)


@dataclass(frozen=True)
class Training:
    """One entry of runs.json.

    Attributes:
        group: step of the plan that it belongs to.
        benchmark: file in results/study.
        row: row of the benchmark.
        seed: fairseq's seed.
        options: ``{option of fairseq-train: value}``, in addition to those of the benchmark.
    """

    group: str
    benchmark: str
    row: str
    seed: int
    options: dict = field(default_factory=dict)

    @property
    def name(self):
        return f"{self.row}-lr{self.options['--lr']}-seed{self.seed}"

    def folder(self, runs):
        return runs / self.group / self.name

    def is_done(self, runs):
        log = self.folder(runs) / "train.log"
        return log.exists() and "done training in" in log.read_text(errors="replace")

    def start(self, runs, data):
        """Train to the end, in a separate process."""
        words = [word for pair in self.options.items() for word in pair]
        return subprocess.run(
            [
                *(sys.executable, "-m", "fairseq_smoe", "train", STUDY / self.benchmark, self.row),
                *("--data", data, "--run", self.folder(runs), "--seed", str(self.seed), "--cpu"),
                *("--max-tokens", "2000", *words),
            ]
        )

    def records(self, runs):
        """Losses of the training, one dict per logged line."""
        log = self.folder(runs) / "train.log"
        found, tokens, last = {}, 0.0, 0
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            for kind in ("train_inner", "valid", "flores"):
                mark = f"| {kind} | {{"
                if mark in line:
                    facts = json.loads(line[line.index(mark) + len(mark) - 1 :])
                    record = self._record(kind, facts)
                    if kind == "train_inner":
                        passed = record["updates"] - last
                        if passed < 0:  # resumed from an earlier update: later lines replace these
                            tokens = max(
                                (
                                    r["target_tokens"]
                                    for (k, u), r in found.items()
                                    if k == kind and u <= record["updates"] - 25
                                ),
                                default=0,
                            )
                            passed = 25
                        tokens += passed * float(facts.get("wpb", 0))
                        last = record["updates"]
                    record["target_tokens"] = round(tokens)
                    found[kind, record["updates"]] = record
        return [found[key] for key in sorted(found, key=lambda key: (key[1], key[0]))]

    def _record(self, kind, facts):
        prefix = "" if kind == "train_inner" else f"{kind}_"

        def value(name):
            return facts.get(prefix + name)

        return {
            "row": self.row,
            "seed": self.seed,
            "lr": self.options["--lr"],
            "updates": int(float(facts.get("num_updates") or facts[f"{prefix}num_updates"])),
            "kind": {"train_inner": "train", "valid": "idev", "flores": "flores"}[kind],
            "loss": value("loss"),
            "nll_loss": value("nll_loss"),
            "seconds": facts.get("wall") if kind == "train_inner" else "",
            "encoder_capacity": value("encoder_requested_capacity"),
            "decoder_capacity": value("decoder_requested_capacity"),
        }


def read_trainings(path):
    return [Training(**entry) for entry in json.loads(path.read_text())]


def collect(trainings, runs, group):
    """Write the losses of a group to its CSV file."""
    records = [r for t in trainings if t.group == group for r in t.records(runs)]
    with open(STUDY / f"losses-{group}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="output of prepare")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="run folders")
    parser.add_argument("--group", help="only this step of the plan")
    parser.add_argument("--only-collect", action="store_true", help="train nothing")
    args = parser.parse_args()
    trainings = read_trainings(STUDY / "runs.json")
    chosen = [t for t in trainings if args.group in (None, t.group)]
    if not chosen:
        parser.error(f"--group {args.group}: expected {', '.join({t.group for t in trainings})}")
    if args.data is None and not args.only_collect:
        parser.error("--data: give the folder that prepare has made")
    for training in chosen if not args.only_collect else ():
        if training.is_done(args.runs):
            continue
        print(f"== {training.group} {training.name}", flush=True)
        code = training.start(args.runs, args.data).returncode
        collect(trainings, args.runs, training.group)
        if code:
            sys.exit(
                f"error: {training.name} ended with exit code {code}; the same command resumes"
            )
    for group in dict.fromkeys(t.group for t in chosen):
        collect(trainings, args.runs, group)


if __name__ == "__main__":
    main()
