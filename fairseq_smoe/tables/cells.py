"""The numbers of a table: ours, the paper's, and which are best."""

import statistics
from dataclasses import dataclass, field

DIGITS = 2  # as the paper


@dataclass
class Cell:
    """One score of one row, ours and the paper's.

    Attributes:
        seeds: ``{seed: score}`` of the runs of this row, in which no run lacks the score.
        paper: the printed score, or None.
        p_value: of our difference from the baseline, None where it was not tested.
        against: our difference from the baseline, None where there is none.
        interval: ``(low, high)``, of 95% over draws from the test set; None where there were none.
    """

    seeds: dict = field(default_factory=dict)
    paper: float | None = None
    p_value: float | None = None
    against: float | None = None
    interval: tuple | None = None

    @property
    def ours(self):
        """Mean over the seeds, or None."""
        return statistics.fmean(self.seeds.values()) if self.seeds else None

    @property
    def spread(self):
        """Standard deviation over the seeds, or None for fewer than two."""
        return statistics.stdev(self.seeds.values()) if len(self.seeds) > 1 else None

    @property
    def difference(self):
        """Ours minus the paper's, or None."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass
class Line:
    """A row of a table.

    Attributes:
        cells: ``{column: Cell}``
        size: ``(parameters, FLOPs per token)`` of our model, or None.
        paper_size: ``(parameters, MFLOPs per token)`` as printed in the paper, or "".
        competes: whether it may be the best or second best.
        baseline: whether the other rows are tested against it.
    """

    name: str
    cells: dict
    size: tuple | None = None
    paper_size: tuple = ("", "")
    competes: bool = True
    baseline: bool = False


def best_two(values):
    """Which values are best and second best as printed; ties share.

    Args:
        values: ``{name: number or None}``

    Returns:
        ``{name: "best" or "second"}``; empty where there is nothing to compare.
    """
    printed = {name: round(value, DIGITS) for name, value in values.items() if value is not None}
    if len(printed) < 2:
        return {}
    order = sorted(set(printed.values()), reverse=True)
    names = dict(zip(order, ("best", "second")))
    return {name: names[value] for name, value in printed.items() if value in names}


def mean_or_none(values):
    """The mean; None if a value is missing."""
    values = list(values)
    return statistics.fmean(values) if values and None not in values else None
