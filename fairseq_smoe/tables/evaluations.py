"""The evaluations that a table is made of."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from fairseq_smoe.benchmarks.benchmark import NAMES
from fairseq_smoe.benchmarks.cleaning import NOT_RECORDED
from fairseq_smoe.benchmarks.runs import RUN_FILE, read_run
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.scoring import SCORES_FILE


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``scores.json`` of one run on one subset.

    Attributes:
        folder: RUN/evaluation/SUBSET
        scores: content of ``scores.json``.
        facts: content of the run's ``run.json``; {} if there is none.
    """

    folder: Path
    scores: dict
    facts: dict = field(default_factory=dict)

    @property
    def run(self):
        return self.folder.parent.parent

    @property
    def name(self):
        return self.scores["name"]

    @property
    def seed(self):
        return self.scores.get("seed")

    @property
    def directions(self):
        return self.scores["directions"]

    @property
    def cleaning(self):
        """What was dropped from the training text."""
        return self.facts.get("cleaning") or self.scores.get("cleaning") or NOT_RECORDED

    def score(self, direction, metric):
        """A corpus score, or None where this direction was not translated.

        Raises:
            OptionError: it was not scored with this metric.
        """
        if direction not in self.directions:
            return None
        if metric not in self.directions[direction]:
            raise OptionError(
                f"--metric {metric}: {self.folder / SCORES_FILE} has only "
                f"{', '.join(self.scores['metrics'])}; score again: python -m fairseq_smoe "
                f"evaluate --run {self.run} --subset {self.folder.name} --metrics {metric}"
            )
        return self.directions[direction][metric]

    def signature(self, metric):
        return self.scores["metrics"].get(metric, "")

    def requested_capacity(self, side):
        """Mean over directions of the "encoder"'s or the "decoder"'s, or None."""
        found = [
            numbers.get("requested_capacity", {}).get(side) for numbers in self.directions.values()
        ]
        found = [number for number in found if number is not None]
        return sum(found) / len(found) if found else None


def read_evaluation(run, subset):
    """The :class:`Evaluation` of a run folder.

    Raises:
        OptionError: no such run, or it is not evaluated.
    """
    run = read_run(run)
    path = run.folder / "evaluation" / subset / SCORES_FILE
    if not path.exists():
        raise OptionError(
            f"{path}: no such file; evaluate the run first: python -m fairseq_smoe evaluate "
            f"--run {run.folder} --subset {subset}"
        )
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{path}: is no JSON ({error}); evaluate again") from None
    return Evaluation(path.parent, scores, run.facts)


def find_evaluations(runs, benchmark, scale, subset, seeds=None):
    """All evaluations of a benchmark's rows at a scale.

    Args:
        runs: folder of ``{benchmark}-{scale}/{row}-seed{seed}/``.
        seeds: only runs of these seeds.

    Returns:
        ``({row name: [Evaluation, ...]}, names of the runs that are not evaluated)``

    Raises:
        OptionError: there are none, or two of the same row and seed.
    """
    folder = Path(runs) / f"{benchmark.name}-{scale}"
    found, not_evaluated = {}, []
    for path in sorted(folder.glob(f"*/{RUN_FILE}")):
        run = read_run(path.parent)
        facts = run.facts
        of_benchmark = Path(facts.get("benchmark", "")).stem == benchmark.name
        if not of_benchmark or facts.get("scale") != scale:
            continue
        if seeds and facts["seed"] not in seeds:
            continue
        if (run.folder / "evaluation" / subset / SCORES_FILE).exists():
            found.setdefault(facts["row"], []).append(read_evaluation(run.folder, subset))
        else:
            not_evaluated.append(str(run.folder))
    if not found:
        raise OptionError(
            _explain_none(runs, folder, benchmark, scale, subset, seeds, not_evaluated)
        )
    for row, evaluations in found.items():
        evaluations.sort(key=lambda evaluation: evaluation.seed)
        for one, other in pairwise(evaluations):
            if one.seed == other.seed:
                raise OptionError(
                    f"{one.run} and {other.run}: are both {row} with seed {one.seed}; move one out "
                    f"of {folder}"
                )
    return found, not_evaluated


def _explain_none(runs, folder, benchmark, scale, subset, seeds, not_evaluated):
    if not_evaluated:
        return (
            f"--runs {runs}: none of the {len(not_evaluated)} runs in {folder} is evaluated on "
            f"{subset}; python -m fairseq_smoe evaluate --run {not_evaluated[0]} --subset {subset}"
        )
    chosen = f" with --seeds {' '.join(map(str, seeds))}" if seeds else ""
    others = sorted(
        path.name.removeprefix(f"{benchmark.name}-")
        for path in Path(runs).glob(f"{benchmark.name}-*")
        if path != folder
    )
    hint = f"; there are runs at --scale {', '.join(others)}" if others else ""
    row = benchmark.rows[0].slug
    name = benchmark.name if benchmark.name in NAMES else f"{benchmark.name}.json"
    return (
        f"--runs {runs}: no runs{chosen} in {folder}{hint}; train and evaluate one: python -m "
        f"fairseq_smoe train {name} {row} --scale {scale}, then python -m fairseq_smoe "
        f"evaluate {name} {row} --scale {scale}"
    )
