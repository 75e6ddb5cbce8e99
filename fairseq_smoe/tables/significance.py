"""Paired bootstrap resampling (Koehn 2004): is one system better than another, or was it luck with
the test set?

Sentences of the test set are drawn with replacement, as many as it has, and both systems are scored
on the same draw; 1,000 times. For a mean over directions, the sentences of each direction are drawn
and the mean of its corpus scores is taken per draw. Directions with equally many sentences share
the draw: in Flores they are the same sentences, whose difficulty is shared, and where they are not,
it makes no difference.
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 12345  # sacrebleu's
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Resampled:
    """A score and what it would have been on other draws of the test set.

    Attributes:
        score: on the test set.
        resamples: (number of draws,) float64
    """

    score: float
    resamples: np.ndarray


class Bootstrap:
    """Draws of sentences, the same for all systems that are to be compared.

    Args:
        number: of draws.
        seed: with sacrebleu's, the draws are those of its ``PairedTest``.
    """

    def __init__(self, number=RESAMPLES, seed=SEED):
        self._number = number
        self._seed = seed
        self._draws = {}  # directions mostly have equally many sentences

    def draws(self, sentences):
        """(number of draws, sentences) float64: how often each draw holds each sentence."""
        if sentences not in self._draws:
            size = (self._number, sentences)
            chosen = np.random.default_rng(self._seed).choice(sentences, size=size, replace=True)
            chosen += sentences * np.arange(self._number)[:, None]
            counts = np.bincount(chosen.ravel(), minlength=self._number * sentences)
            self._draws[sentences] = counts.reshape(size).astype(np.float64)
        return self._draws[sentences]

    def resample(self, metric, statistics):
        """Score a system on one direction, and on draws of its sentences.

        Args:
            metric: see ``translation_metrics.py``.
            statistics: (sentences, counts), what ``metric.statistics`` returned.

        Returns:
            :class:`Resampled`
        """
        sums = self.draws(len(statistics)) @ statistics
        score = float(metric.score_sums(statistics.sum(axis=0)))
        return Resampled(score, metric.score_sums(sums))


def mean_of(resampled):
    """The mean of several :class:`Resampled`, such as those of all directions into English."""
    resampled = list(resampled)
    return Resampled(
        float(np.mean([one.score for one in resampled])),
        np.mean([one.resamples for one in resampled], axis=0),
    )


def p_value(system, baseline):
    """How likely such a difference, in either direction, is by chance; sacrebleu's ``PairedTest``
    computes the same.

    It counts the draws in which the absolute difference exceeds its mean over the draws by more
    than the observed one. Systems that score the same on every draw get 1, where sacrebleu says
    1/1001.

    Args:
        system, baseline: :class:`Resampled` of the same draws.
    """
    differences = np.abs(system.resamples - baseline.resamples)
    if not differences.any():
        return 1.0
    observed = abs(system.score - baseline.score)
    beyond = int(np.sum(differences - differences.mean() > observed))
    return (beyond + 1) / (len(differences) + 1)
