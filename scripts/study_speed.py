"""Speed of the study's trained models relative to the dense one, in training and in beam search.

    python scripts/study_speed.py --data data --runs runs/study

Each model takes turns with the dense one of the same group, every time in a process of its own, as
in use: it trains on for some updates from its last checkpoint, which is not changed, and translates
a part of the held-out text with fairseq-generate. Where tokens go decides about the speed, and
trained gates send them elsewhere than those of a new model. The results are kept in
results/study/speeds.csv.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from study import read_trainings
from study_scores import STUDY, replace
from tqdm import tqdm

from fairseq_smoe.plots.train_log import read_log
from fairseq_smoe.plugin_folder import PLUGIN_FOLDER

DENSE = "dense"
KINDS = ("training", "beam search")
COLUMNS = ("group", "row", "kind", "round", "tokens_per_second", "dense_tokens_per_second")
WARM_UP = 20  # updates
INTERVAL = 10  # updates between lines of the log


def training_speed(training, args):
    """Target tokens a second."""
    last = int(training.options["--max-update"])
    options = {
        **training.options,
        "--restore-file": training.checkpoint(args.runs).absolute(),
        "--max-update": last + WARM_UP + args.updates,
        "--log-interval": INTERVAL,
    }
    with tempfile.TemporaryDirectory() as folder:
        printed(
            *(sys.executable, "-m", "fairseq_smoe"),
            *training.command(training.row, folder, args.data, options),
            *("--no-save", "--disable-validation"),
        )
        logged = read_log(Path(folder) / "train.log")["train_inner"]
    return median(float(x["wps"]) for updates, x in logged.items() if updates > last + WARM_UP)


def translation_speed(training, args):
    """Tokens of translations a second."""
    source, target = args.direction.split("-")
    text = printed(
        *(Path(sys.executable).with_name("fairseq-generate"), training.prepared(args.data)),
        *("--user-dir", PLUGIN_FOLDER, "--task", "smoe_translation"),
        *("--source-lang", source, "--target-lang", target, "--gen-subset", args.subset),
        *("--path", training.checkpoint(args.runs), "--cpu", "--max-tokens", 2000),
        *("--beam", 5, "--max-len-b", 100, "--num-shards", args.shards, "--shard-id", 0),
    )
    return float(re.search(r"Translated .*, ([\d.]+) tokens/s\)", text)[1])


def printed(*command):
    """All that a command prints; ends with it if it fails."""
    command = list(map(str, command))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: {' '.join(command)} ended with {done.returncode}")
    return done.stdout + done.stderr


def speeds_file():
    return STUDY / "speeds.csv"


def compare(training, dense, args, progress):
    """Lines of the file for one model."""
    lines = []
    for number in range(1, args.rounds + 1):
        for kind, measure in zip(KINDS, (training_speed, translation_speed)):
            speeds = [measure(each, args) for each in (training, dense)]
            facts = (training.group, training.row, kind, number, *(f"{x:.1f}" for x in speeds))
            lines.append(dict(zip(COLUMNS, facts)))
            progress.update()
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="as of study.py")
    add("--runs", type=Path, required=True, metavar="DIR", help="as of study.py")
    add("--group", default="family", help="(default: %(default)s)")
    add("--rows", nargs="+", metavar="ROW", help="(default: all with a checkpoint)")
    add("--rounds", type=int, default=3, help="turns of each model (default: %(default)s)")
    add("--direction", default="msa-eng", help="that is translated (default: %(default)s)")
    add("--subset", default="test1", help="that is translated (default: %(default)s)")
    add("--shards", type=int, default=10, help="of it, only one is (default: %(default)s)")
    add("--updates", type=int, default=60, help="of a turn (default: %(default)s)")
    args = parser.parse_args()
    found = {
        training.row: training
        for training in read_trainings(STUDY / "runs.json")
        if training.group == args.group and training.checkpoint(args.runs).exists()
    }
    rows = args.rows or [row for row in found if row != DENSE]
    missing = [row for row in (DENSE, *rows) if row not in found]
    if missing:
        parser.error(f"--runs {args.runs}: no checkpoint of {', '.join(missing)} in {args.group}/")
    with tqdm(total=len(rows) * args.rounds * len(KINDS), unit="turn") as progress:
        for row in rows:
            progress.set_description(row)
            lines = compare(found[row], found[DENSE], args, progress)
            replace(speeds_file(), COLUMNS, {"group": args.group, "row": row}, lines)


if __name__ == "__main__":
    main()
