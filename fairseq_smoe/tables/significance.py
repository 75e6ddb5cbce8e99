"""Paired bootstrap resampling (Koehn 2004): whether one system is significantly better than
another.

As many sentences as the test set has are drawn from it with replacement, 1,000 times, and both
systems are scored on each draw. For a mean over directions, sentences are drawn per direction, and
the corpus scores are averaged per draw. Directions with equally many sentences use the same draws:
in Flores they have the same sentences, and so share their difficulty. For other directions this
makes no difference.
"""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 12345  # sacrebleu's
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Resampled:
    """A score, and the scores on draws from the test set.

    Attributes:
        score: on the test set.
        resamples: (number of draws,) float64
    """

    score: float
    resamples: np.ndarray


class Bootstrap:
    """Draws of sentences, the same for all systems that are compared.

    Args:
        number: number of draws.
        seed: with sacrebleu's seed, the draws are those of its ``PairedTest``.
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


def interval(resamples):
    """Bounds between which 95% of the scores on draws lie, or of their differences."""
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(low), float(high)


def p_value(system, baseline):
    """Two-sided p-value of the difference between two systems, as sacrebleu's ``PairedTest``.

    It counts the draws in which the absolute difference exceeds its mean over the draws by more
    than the observed one. Systems with equal scores on every draw get 1, where sacrebleu returns
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
