"""Removing the output of steps before they are repeated."""

import re
import shutil

from fairseq_smoe.preparation.options import STEPS
from fairseq_smoe.translation.task_files import LANGS_FILE

REPORT_FILES = ("report.md", "report.json", "report-sizes.png", "report-lengths.png")


def remove_outputs(plan, first):
    """Remove the output of ``first`` and all later steps, by exact names. Downloads are kept."""
    for step in STEPS[STEPS.index(first) :]:
        for path in _outputs(plan, step):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for shard in _shards(plan):
        if not any(shard.iterdir()):
            shard.rmdir()


def _outputs(plan, step):
    return {
        "fetch": [plan.raw],
        "verify": [plan.summary("verify")],
        "clean": [plan.clean],
        "sentencepiece": [
            *(plan.sample, plan.model, plan.target / LANGS_FILE),
            *_named(plan.target, r"dict(\.[^.]+)?\.txt|spm\.[^.]+\.model"),
        ],
        "encode": [plan.ids],
        "binarise": [
            plan.summary("binarise"),
            *(path for folder in (plan.target, *_shards(plan)) for path in _binary_files(folder)),
            *_named(plan.target, r"(valid|test\d*)\.[^.]+-[^.]+\.[^.]+\.txt"),
        ],
        "report": [plan.target / name for name in REPORT_FILES],
    }[step]


def _binary_files(folder):
    return _named(folder, r"(train|valid|test\d*)\.[^.]+-[^.]+\.[^.]+\.(bin|idx)")


def _shards(plan):
    return [path for path in _named(plan.target, r"shard\d{3,}") if path.is_dir()]


def _named(folder, pattern):
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
