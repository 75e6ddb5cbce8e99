"""Runs the trainings of the study (results/study/PLAN.md) one by one, and collects their losses.

    python scripts/study.py --data data/study-m4 --runs runs/study            all that are not done
    python scripts/study.py --data ... --runs ... --group rate                one step of the plan
    python scripts/study.py --runs runs/study --only-collect                  only write the CSV files

The command can be stopped and run again: it skips finished trainings and resumes interrupted ones.
After every training, the losses of its group are written to results/study/losses-GROUP.csv. Trainings
whose losses are complete there are finished, too, and their lines are kept if the run folder is gone.
"""

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fairseq_smoe.plots.train_log import read_log

STUDY = Path(__file__).resolve().parent.parent / "results" / "study"
# what fairseq logs -> the name of its text
KINDS = {"train_inner": "train", "valid": "idev", "flores": "flores"}
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
        if log.exists():
            return "done training in" in log.read_text(errors="replace")
        return any(
            record["kind"] == "idev" and record["updates"] == self.options["--max-update"]
            for record in self.collected()
        )

    def collected(self):
        """The lines of this training in the CSV file of its group."""
        path = losses_file(self.group)
        if not path.exists():
            return []
        with open(path, newline="") as file:
            own = (self.row, str(self.seed), self.options["--lr"])
            return [r for r in csv.DictReader(file) if (r["row"], r["seed"], r["lr"]) == own]

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
        """Losses of the training, one dict for each update and kind that was logged; those collected
        before, if there is no run folder."""
        log = self.folder(runs) / "train.log"
        if not log.exists():
            return self.collected()
        logged = read_log(log)
        points = sorted(
            (updates, order, name)
            for order, name in enumerate(KINDS)
            for updates in logged.get(name, ())
        )
        records, tokens, passed = [], 0, 0
        for updates, _, name in points:
            facts = logged[name][updates]
            if name == "train_inner":
                tokens += (updates - passed) * float(facts["wpb"])
                passed = updates
            records.append(self._record(name, facts, updates, round(tokens)))
        return records

    def _record(self, name, facts, updates, tokens):
        prefix = "" if name == "train_inner" else f"{name}_"
        return {
            "row": self.row,
            "seed": self.seed,
            "lr": self.options["--lr"],
            "updates": updates,
            "kind": KINDS[name],
            "loss": facts[f"{prefix}loss"],
            "nll_loss": facts[f"{prefix}nll_loss"],
            "target_tokens": tokens,
            "seconds": facts.get("wall", ""),
            "encoder_capacity": facts.get(f"{prefix}encoder_requested_capacity", ""),
            "decoder_capacity": facts.get(f"{prefix}decoder_requested_capacity", ""),
        }


def losses_file(group):
    return STUDY / f"losses-{group}.csv"


def read_trainings(path):
    return [Training(**entry) for entry in json.loads(path.read_text())]


def collect(trainings, runs, group):
    """Write the losses of a group to its CSV file."""
    records = [r for t in trainings if t.group == group for r in t.records(runs)]
    with open(losses_file(group), "w", newline="") as file:
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
