"""Checks that the runs of a table are comparable."""

import json
from dataclasses import asdict

from fairseq_smoe.benchmarks.cleaning import in_words, rules_of


def differences(evaluations, metric):
    """One sentence for each condition in which the evaluations differ.

    Conditions are the updates of the checkpoint, the batch, the data folder and its cleaning, the
    settings of the search, the number of sentences, and the metric's signature.
    """
    conditions = {
        "updates": lambda e: e.scores.get("num_updates"),
        "target tokens per update": lambda e: e.facts.get("batch_tokens"),
        "data": lambda e: e.facts.get("data"),
        "cleaning of the training text": lambda e: e.cleaning,
        "settings": lambda e: e.scores.get("settings"),
        "signature": lambda e: e.signature(metric),
        "directions": lambda e: ", ".join(sorted(e.directions)),
    }
    found = []
    for name, get in conditions.items():
        groups = {}
        for evaluation in evaluations:
            groups.setdefault(_text(get(evaluation)), []).append(evaluation.name)
        if len(groups) > 1:
            found.append(f"the runs differ in {name}: {_told(groups)}")
    sizes = {}
    for evaluation in evaluations:
        for direction, numbers in evaluation.directions.items():
            sizes.setdefault(direction, set()).add(numbers["sentences"])
    for direction, numbers in sizes.items():
        if len(numbers) > 1:
            told = ", ".join(map(str, sorted(numbers)))
            found.append(f"the runs differ in sentences of {direction}: {told}")
    return found


def updates_text(evaluations):
    """``"3,000 updates"`` or ``"2,900 to 3,000 updates"``"""
    numbers = [e.scores["num_updates"] for e in evaluations if e.scores.get("num_updates")]
    if not numbers:
        return "an unknown number of updates"
    low, high = min(numbers), max(numbers)
    return f"{high:,} updates" if low == high else f"{low:,} to {high:,} updates"


def cleanings(evaluations):
    """The cleaning of all runs' training text; several are joined."""
    return "; ".join(sorted({e.cleaning for e in evaluations}))


def cleaning_text(evaluations, benchmark=None):
    """``"Cleaning of the training text: none."``, and the benchmark's if it is another."""
    ours = cleanings(evaluations)
    text = f"Cleaning of the training text: {ours}"
    if benchmark:
        name, rules = rules_of(benchmark.clean)
        defined = in_words(name, asdict(rules))
        if defined != ours:
            text += f" ({benchmark.title} defines: {defined})"
    return f"{text}."


def settings_text(evaluation):
    """``"beam 5, lenpen 1.0"``"""
    settings = evaluation.scores.get("settings") or {}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _told(groups):
    """The value of most runs without their names."""
    largest = max(groups, key=lambda value: len(groups[value]))
    parts = [f"{value} ({', '.join(names)})" for value, names in groups.items() if value != largest]
    rest = "the others" if len(groups[largest]) > 1 else groups[largest][0]
    return "; ".join([*parts, f"{largest} ({rest})"])


def _text(value):
    return value if isinstance(value, str) else json.dumps(value)
