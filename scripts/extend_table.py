"""The table of scripts/extend_recipe.sh: mean scores of old and new directions of each model.

    python scripts/extend_table.py WORK/runs --to results/extend
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from result_files import markdown, write_csv

from fairseq_smoe.files import write_whole

MODELS = {
    "without-tgl": "before, without Tagalog",
    "joint": "all languages from the start",
    "everything": "Tagalog alone, all parameters",
    "new-rows": "Tagalog alone, only rows of new tokens",
    "new-experts": "Tagalog alone, rows of new tokens, 4 new experts and the gates",
    "mixed": "Tagalog and old text, half each",
}
NEW = ("eng-tgl", "tgl-eng")
COLUMNS = ("model", "direction", "bleu", "chrf++")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the trainings")
    parser.add_argument("--to", type=Path, required=True, help="folder for table.md, scores.csv")
    args = parser.parse_args()
    lines, rows = [], []
    for name, title in MODELS.items():
        path = args.runs / name / "evaluation" / "test1" / "scores.json"
        scores = {
            direction: (facts["bleu"], facts["chrf++"])
            for direction, facts in json.loads(path.read_text())["directions"].items()
        }
        lines += [
            dict(zip(COLUMNS, (name, direction, *(f"{score:.2f}" for score in own))))
            for direction, own in scores.items()
        ]
        groups = [[own for d, own in scores.items() if (d in NEW) == new] for new in (False, True)]
        means = [f"{mean(each):.2f}" if each else "" for group in groups for each in both(group)]
        rows.append([title, *means])
    args.to.mkdir(parents=True, exist_ok=True)
    write_csv(args.to / "scores.csv", COLUMNS, lines)
    columns = ["model", "old: BLEU", "chrF++", "new: BLEU", "chrF++"]
    table = markdown(columns, rows) + "\n"
    write_whole(args.to / "table.md", table)
    print(table, end="")


def both(group):
    """All BLEU scores, and all chrF++ scores."""
    return list(zip(*group)) or [(), ()]


if __name__ == "__main__":
    main()
