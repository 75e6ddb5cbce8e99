"""The results of scripts/check_gpu.sh as one page of Markdown.

python scripts/gpu_table.py OUT > OUT/gpu.md
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fairseq_smoe.plots.train_log import read_log  # noqa: E402
from fairseq_smoe.text_table import aligned  # noqa: E402

# step with a table of its own -> its title
TABLES = {
    "block-grouped_mm": "A block, experts multiplied by grouped_mm",
    "block-loop": "A block, experts multiplied one by one",
    "train": "Training steps",
    "options": "Training steps with options",
    "generate": "Beam search",
    "batch": "The largest batch",
    "m15": "M15",
}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    print("\n".join([*title(out), *steps(out)]))
    parts = {"Doctor": doctor(out), "Tests": tests(out)}
    parts |= {title: table(out / name / "table.md") for name, title in TABLES.items()}
    parts["M4, side by side"] = side_by_side(out / "m4")
    for heading, lines in parts.items():
        if lines:
            print(f"\n## {heading}\n")
            print("\n".join(lines))


def title(out):
    """The machine, as a benchmark has recorded it."""
    for path in sorted(out.glob("*/results.json")):
        facts = json.loads(path.read_text())
        machine = facts["gpu"] or facts["processor"]
        about = f"torch {facts['torch']}, {facts['date']}: `bash scripts/check_gpu.sh`"
        return [f"# {machine}", "", about, ""]
    return ["# Check of a GPU", ""]


def steps(out):
    """What became of each step; the last time counts."""
    lines = (out / "steps.tsv").read_text().splitlines()
    last = {line.split("\t")[0]: tuple(line.split("\t")) for line in lines}
    return aligned(("step", "seconds", "outcome"), list(last.values()), left=1)


def table(path):
    return path.read_text().splitlines() if path.exists() else []


def doctor(out):
    return (
        ["```", *table(out / "doctor/log.txt"), "```"] if (out / "doctor/log.txt").exists() else []
    )


def tests(out):
    """How many tests passed, and the names of those that did not."""
    path = out / "tests/junit.xml"
    if not path.exists():
        return []
    cases = list(ElementTree.parse(path).iter("testcase"))
    wrong = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    lines = [f"{len(cases) - len(wrong) - skipped} passed, {len(wrong)} failed, {skipped} skipped"]
    return lines + [f"* failed: `{case.get('classname')}::{case.get('name')}`" for case in wrong]


def side_by_side(folder):
    """Updates, losses and scores of the models that were trained."""
    rows = []
    for path in sorted(folder.glob("*/scores.json")):
        log, scores = read_log(path.parent / "train.log"), json.loads(path.read_text())
        updates, facts = max(log["valid"].items())
        mean = {
            metric: sum(d[metric] for d in scores["directions"].values())
            / len(scores["directions"])
            for metric in ("bleu", "piece-bleu")
        }
        cells = (facts["valid_nll_loss"], f"{mean['bleu']:.2f}", f"{mean['piece-bleu']:.2f}")
        rows.append((path.parent.name, str(updates), *cells))
    header = ("row", "updates", "valid nll_loss", "BLEU", "BLEU of pieces")
    return aligned(header, rows, left=1) if rows else []


if __name__ == "__main__":
    main()
