"""Runs the trainings of the study (results/study/PLAN.md), and keeps what they come to.

    python scripts/study.py --data data --runs runs/study         all that are not done
    python scripts/study.py --data ... --runs ... --group rate    one step of the plan
    python scripts/study.py --runs runs/study --only-collect      only write the CSV files

The command can be stopped and run again: it skips finished trainings and resumes interrupted ones.
Several may run at a time, each on a core of its own: they take different trainings. After every
training, the losses of its group are written to results/study/losses-GROUP.csv and, if the group
says so, translations of held-out text are scored (study_scores.py). What is complete there is
finished, too: its lines are kept if the run folder is gone.
"""

import argparse
import fcntl
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import study_scores
from result_files import read_csv, write_csv
from study_scores import STUDY

from fairseq_smoe.plots.train_log import read_log

# what fairseq logs -> the name of its text
KINDS = {"train_inner": "train", "valid": "idev", "flores": "flores"}
COLUMNS = (
    *("row", "seed", "lr", "updates", "kind", "loss", "nll_loss", "target_tokens", "seconds"),
    *("encoder_capacity", "decoder_capacity", "encoder_experts", "decoder_experts"),
)


@dataclass(frozen=True)
class Training:
    """One entry of runs.json.

    Attributes:
        group: step of the plan that it belongs to.
        benchmark: file in results/study.
        row: row of the benchmark.
        seed: fairseq's seed.
        lr: peak learning rate.
        options: ``{option of fairseq-train: value}``, in addition to those of the benchmark.
        subsets: what its model translates.
        upcycle: None, or how the model begins: ``{"dense": {option: value}, "convert": {option:
            value}}`` trains a dense model with these options, and makes its FFNs into experts.
    """

    group: str
    benchmark: str
    row: str
    seed: int
    lr: str
    options: dict = field(default_factory=dict)
    subsets: tuple = ()
    upcycle: dict | None = None

    @property
    def name(self):
        return f"{self.row}-lr{self.lr}-seed{self.seed}"

    def folder(self, runs):
        return runs / self.group / self.name

    def checkpoint(self, runs):
        """What the training has come to, or has been saved of it so far."""
        return self.folder(runs) / "checkpoints" / "checkpoint_last.pt"

    def prepared(self, data):
        """Folder of the benchmark's text, of all that prepare has made."""
        return data / Path(self.benchmark).stem

    def is_trained(self, runs):
        log = self.folder(runs) / "train.log"
        if log.exists():
            return "done training in" in log.read_text(errors="replace")
        return any(
            record["kind"] == "idev" and record["updates"] == self.options["--max-update"]
            for record in self.collected()
        )

    def collected(self):
        """The lines of this training in the CSV file of its group."""
        own = (self.row, str(self.seed), self.lr)
        lines = read_csv(losses_file(self.group))
        return [line for line in lines if (line["row"], line["seed"], line["lr"]) == own]

    def train(self, runs, data):
        """Train to the end, in a separate process."""
        folder, begin = self.folder(runs), {}
        if self.upcycle:
            begin = {"--finetune-from-model": folder / "upcycled.pt"}
            if not (folder / "upcycled.pt").exists():
                options = {**self.options, **self.upcycle["dense"]}
                self._train("dense", folder / "dense", data, options)
                dense = folder / "dense" / "checkpoints" / "checkpoint_last.pt"
                options = words_of(self.upcycle["convert"])
                call("convert", "upcycle", dense, folder / "upcycled.pt", *options)
        self._train(self.row, folder, data, {**self.options, **begin})

    def _train(self, row, folder, data, options):
        call(*self.command(row, folder, data, options))

    def command(self, row, folder, data, options):
        """Words of ``python -m fairseq_smoe`` that train a row in a folder."""
        return (
            *("train", STUDY / self.benchmark, row, "--data", self.prepared(data)),
            *("--run", folder, "--cpu", "--max-tokens", "2000"),
            *("--seed", self.seed, "--lr", self.lr, *words_of(options)),
        )

    def translate(self, runs, data):
        call(
            *("evaluate", "--run", self.folder(runs), "--data", self.prepared(data)),
            *("--cpu", "--processes", "1"),
            *("--checkpoint", self.checkpoint(runs)),
            *("--subset", ",".join(self.subsets), "--max-len-b", "100"),
            *("--metrics", "bleu", "chrf++"),
        )

    def records(self, runs):
        """Losses of the training, one dict for each update and kind that was logged; those
        collected before, if there is no run folder."""
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
            "lr": self.lr,
            "updates": updates,
            "kind": KINDS[name],
            "loss": facts[f"{prefix}loss"],
            "nll_loss": facts[f"{prefix}nll_loss"],
            "target_tokens": tokens,
            "seconds": facts.get("wall", ""),
            "encoder_capacity": facts.get(f"{prefix}encoder_requested_capacity", ""),
            "decoder_capacity": facts.get(f"{prefix}decoder_requested_capacity", ""),
            "encoder_experts": facts.get(f"{prefix}encoder_experts_per_token", ""),
            "decoder_experts": facts.get(f"{prefix}decoder_experts_per_token", ""),
        }


def words_of(options):
    """``{option: value}`` as words of a command line."""
    return [word for pair in options.items() for word in pair]


def call(*words):
    """Run a command of fairseq_smoe; end with it if it fails."""
    command = [sys.executable, "-m", "fairseq_smoe", *map(str, words)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(
            f"error: {' '.join(command)} ended with exit code {code}; the same command resumes"
        )


def losses_file(group):
    return STUDY / f"losses-{group}.csv"


def read_trainings(path):
    groups = json.loads(path.read_text())
    return [
        Training(
            group=name,
            benchmark=group["benchmark"],
            **{
                **entry,
                "options": {**group["options"], **entry.get("options", {})},
                "subsets": tuple(entry.get("subsets", group.get("subsets", ()))),
            },
        )
        for name, group in groups.items()
        for entry in group["trainings"]
    ]


def collect(trainings, runs, group):
    """Write the losses of a group to its CSV file."""
    records = [r for t in trainings if t.group == group for r in t.records(runs)]
    write_csv(losses_file(group), COLUMNS, records)


def complete(training, trainings, args):
    """Train, collect and score one training, as far as that is not done. Does nothing if another
    process does it."""
    folder = training.folder(args.runs)
    if training.is_trained(args.runs) and study_scores.are_complete(training):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "study.lock", wait=False) as mine:
        if not mine:
            return
        print(f"== {training.group} {training.name}", flush=True)
        if not training.is_trained(args.runs):
            training.train(args.runs, args.data)
        with locked(args.runs / "collect.lock"):
            collect(trainings, args.runs, training.group)
        if not study_scores.are_complete(training):
            training.translate(args.runs, args.data)
            with locked(args.runs / "collect.lock"):
                study_scores.add(training, folder)


@contextmanager
def locked(path, wait=True):
    """Hold a lock, which the kernel releases however the process ends. Yields whether this process
    holds it; False only if it does not wait for another one."""
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the output of prepare for each benchmark, named as it: study-m4",
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="run folders")
    parser.add_argument("--group", help="only this step of the plan")
    parser.add_argument("--only-collect", action="store_true", help="train nothing")
    args = parser.parse_args()
    groups = {training.group for training in read_trainings(STUDY / "runs.json")}
    if args.group not in (None, *groups):
        parser.error(f"--group {args.group}: expected {', '.join(sorted(groups))}")
    if args.data is None and not args.only_collect:
        parser.error("--data: give the folder of what prepare has made")
    tried = set()
    while not args.only_collect:
        # read anew each time, as the list may have become longer meanwhile
        trainings = read_trainings(STUDY / "runs.json")
        left = [t for t in chosen(trainings, args) if t.folder(args.runs) not in tried]
        if not left:
            break
        tried.add(left[0].folder(args.runs))
        complete(left[0], trainings, args)
    trainings = read_trainings(STUDY / "runs.json")
    for group in dict.fromkeys(t.group for t in chosen(trainings, args)):
        collect(trainings, args.runs, group)


def chosen(trainings, args):
    return [t for t in trainings if args.group in (None, t.group)]


if __name__ == "__main__":
    main()
