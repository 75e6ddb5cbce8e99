"""Significance tests of differences between evaluations."""

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.scoring import make_metric, read_directions
from fairseq_smoe.tables.significance import Bootstrap, interval, mean_of, p_value


class PairedTests:
    """Paired bootstrap tests of evaluations on the same test set.

    Args:
        metric: name of the metric; not comet.
        flores200_spm: for spbleu, see ``scoring.py``.
        advance: called after every direction of every evaluation that was read.

    Attributes:
        warnings: why something could not be tested.
    """

    def __init__(self, metric, flores200_spm=None, advance=lambda: None):
        self._name = metric
        self._flores200_spm = flores200_spm
        self._advance = advance
        self._metrics = {}  # keys: what the results depend on
        self._bootstrap = Bootstrap()
        self._resampled = {}
        self._directions = {}
        self._references = {}
        self.warnings = []

    def p_value(self, evaluations, baseline, directions):
        """p-value of the difference between two systems' mean scores, each the mean over its seeds.

        Args:
            evaluations, baseline: lists of Evaluations, one per seed.
            directions: over which the mean goes.

        Returns:
            the p-value; None if something cannot be compared.
        """
        systems = [self._mean(seeds, directions) for seeds in (evaluations, baseline)]
        return None if None in systems else p_value(*systems)

    def interval(self, evaluations, directions):
        """The bootstrap interval of a system's mean score; None if it cannot be had.

        Args:
            evaluations, directions: see :meth:`p_value`.
        """
        system = self._mean(evaluations, directions)
        return None if system is None else interval(system.resamples)

    def _mean(self, evaluations, directions):
        try:
            return mean_of(
                mean_of(self._resample(evaluation, direction) for evaluation in evaluations)
                for direction in directions
            )
        except OptionError as error:
            warning = f"not everything could be tested: {error}"
            if warning not in self.warnings:
                self.warnings.append(warning)
            return None

    def _resample(self, evaluation, direction):
        key = evaluation.folder, direction
        if key not in self._resampled:
            try:
                self._resampled[key] = self._compute(evaluation, direction)
            except OptionError as error:
                self._resampled[key] = error
            self._advance()
        if isinstance(self._resampled[key], OptionError):
            raise self._resampled[key]
        return self._resampled[key]

    def _compute(self, evaluation, direction):
        folder = evaluation.folder
        if folder not in self._directions:
            self._directions[folder] = {found.name: found for found in read_directions(folder)}
        translated = self._directions[folder].get(direction)
        if translated is None:
            raise OptionError(f"{folder}: has no translations of {direction}")
        metric = self._metric(translated.has_language_token)
        hypotheses, references = getattr(translated, metric.suffix)
        first, known = self._references.setdefault(direction, (folder, references))
        if references != known:
            raise OptionError(
                f"{direction}: {first} and {folder} have different references; evaluate both on "
                "the same test set"
            )
        resampled = self._bootstrap.resample(metric, metric.statistics(hypotheses, references))
        told = evaluation.score(direction, self._name)
        if abs(resampled.score - told) > metric.tolerance:
            raise OptionError(
                f"{folder}: {direction} has {self._name} {told:.2f} in scores.json, but its "
                f"translations {resampled.score:.2f}; evaluate again"
            )
        return resampled

    def _metric(self, language_token):
        if language_token not in self._metrics:
            self._metrics[language_token] = make_metric(
                self._name, self._flores200_spm, language_token
            )
        return self._metrics[language_token]
