"""Scores of the study's models on held-out text: results/study/scores.csv and draws-TEXT.csv.

The draws of the paired bootstrap are the same for all systems (fairseq_smoe.tables.significance).
So the mean BLEU of a model on each draw is all that is needed to compare it with any other model
later, when its translations are gone.
"""

import json
from pathlib import Path

from result_files import read_csv, write_csv

from fairseq_smoe.evaluation.scoring import make_metric, read_directions
from fairseq_smoe.tables.significance import RESAMPLES, Bootstrap, mean_of

STUDY = Path(__file__).resolve().parent.parent / "results" / "study"
# fairseq's subset -> the name of its text
TEXTS = {"test1": "itest", "test": "flores"}
MEAN = "mean"
KEY = ("group", "row", "seed", "lr")
SCORES = (*KEY, "text", "direction", "bleu", "chrf++")
DRAWS = (*KEY, *(f"draw{number}" for number in range(1, RESAMPLES + 1)))


def key_of(training):
    """What identifies a training in the files."""
    return tuple(str(getattr(training, name)) for name in KEY)


def are_complete(training):
    """Whether the files have the scores of a training on all its subsets."""
    found = {line["text"] for line in read_csv(scores_file()) if same(line, key_of(training))}
    return found.issuperset(TEXTS[subset] for subset in training.subsets)


def add(training, folder):
    """Score what the model of a training has translated, and add it to the files.

    Args:
        folder: of the run, with ``evaluation/SUBSET`` for all subsets of the training.
    """
    key = dict(zip(KEY, key_of(training)))
    for subset in training.subsets:
        translations = folder / "evaluation" / subset
        text = TEXTS[subset]
        directions = json.loads((translations / "scores.json").read_text())["directions"]
        scores = {name: (facts["bleu"], facts["chrf++"]) for name, facts in directions.items()}
        scores[MEAN] = [sum(each) / len(scores) for each in zip(*scores.values())]
        lines = [
            {**key, "text": text, "direction": name, "bleu": f"{bleu:.2f}", "chrf++": f"{chrf:.2f}"}
            for name, (bleu, chrf) in scores.items()
        ]
        replace(scores_file(), SCORES, {**key, "text": text}, lines)
        draws = [f"{score:.3f}" for score in resampled_bleu(translations)]
        replace(draws_file(text), DRAWS, key, [dict(zip(DRAWS, (*key.values(), *draws)))])


def resampled_bleu(translations):
    """Mean BLEU of all directions on every draw of the bootstrap."""
    bootstrap, metric = Bootstrap(), make_metric("bleu")
    return mean_of(
        bootstrap.resample(metric, metric.statistics(*direction.txt))
        for direction in read_directions(translations)
    ).resamples


def scores_file():
    return STUDY / "scores.csv"


def draws_file(text):
    return STUDY / f"draws-{text}.csv"


def same(line, key):
    return tuple(line[name] for name in KEY) == key


def replace(path, columns, key, lines):
    """Put lines in the place of those that agree with ``key``."""
    others = [x for x in read_csv(path) if any(x[name] != key[name] for name in key)]
    write_csv(path, columns, [*others, *lines])
