"""Paired bootstrap against sacrebleu's, and for means over directions."""

import time

import numpy as np
import pytest
from evaluation_folders import TEXT, sentences, to_pieces, worse
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from fairseq_smoe.evaluation.translation_metrics import PieceBleu, bleu, chrf_plus_plus
from fairseq_smoe.tables.significance import Bootstrap, mean_of, p_value

# share of wrong words of system and baseline: from far apart to hardly different
PAIRS = [(0.15, 0.35), (0.20, 0.22), (0.25, 0.24), (0.30, 0.27)]


@pytest.mark.parametrize("shares", PAIRS)
@pytest.mark.parametrize(
    "ours, theirs", [(bleu, BLEU), (chrf_plus_plus, lambda: CHRF(word_order=2))]
)
def test_p_value_is_sacrebleus(ours, theirs, shares):
    systems = [worse(TEXT, share, seed) for seed, share in enumerate(shares)]
    named = [("baseline", systems[1]), ("system", systems[0])]
    _, table = PairedTest(named, {"metric": theirs()}, [TEXT], test_type="bs", n_samples=1000)()
    expected = next(results[1] for name, results in table.items() if name != "System")
    metric, bootstrap = ours(), Bootstrap()
    system, baseline = [
        bootstrap.resample(metric, metric.statistics(lines, TEXT)) for lines in systems
    ]
    assert system.score == pytest.approx(expected.score, rel=1e-6)
    assert system.resamples.mean() == pytest.approx(expected.mean, rel=1e-4)
    assert p_value(system, baseline) == expected.p_value
    assert 0 < expected.p_value < 1


def test_p_values_of_the_pairs_are_far_apart():
    """The test above compares more than one value."""
    metric, bootstrap = bleu(), Bootstrap()
    values = []
    for shares in PAIRS:
        system, baseline = [
            bootstrap.resample(metric, metric.statistics(worse(TEXT, share, seed), TEXT))
            for seed, share in enumerate(shares)
        ]
        values.append(p_value(system, baseline))
    assert min(values) < 0.01 and max(values) > 0.2


def test_corpus_score_of_pieces_is_that_of_scoring():
    references = list(map(to_pieces, TEXT))
    references[3] = references[3].replace("▁the", "<unk>") + " <unk>"
    hypotheses = [line.replace("▁the", "<unk>", 1) for line in map(to_pieces, worse(TEXT, 0.3))]
    metric = PieceBleu()
    resampled = Bootstrap().resample(metric, metric.statistics(hypotheses, references))
    assert resampled.score == pytest.approx(metric.corpus_score(hypotheses, references), rel=1e-12)
    assert 5 < resampled.score < 95


def test_a_resample_is_the_corpus_score_of_its_sentences():
    """Of the drawn sentences, repeated as often as drawn."""
    hypotheses, metric, bootstrap = worse(TEXT, 0.3), bleu(), Bootstrap(number=3)
    found = bootstrap.resample(metric, metric.statistics(hypotheses, TEXT))
    for draw, score in zip(bootstrap.draws(len(TEXT)).astype(int), found.resamples, strict=True):
        assert draw.sum() == len(TEXT)
        drawn = [np.repeat(lines, draw).tolist() for lines in (hypotheses, TEXT)]
        assert score == pytest.approx(bleu().corpus_score(*drawn))


def directions(shares, sizes=(60, 60, 90), seed=0):
    """Resampled BLEU of three directions of a system."""
    bootstrap, metric = Bootstrap(), bleu()
    found = []
    for i, size in enumerate(sizes):
        references = sentences(size, seed=10 + i)
        lines = worse(references, shares[i], seed=seed + i)
        found.append(bootstrap.resample(metric, metric.statistics(lines, references)))
    return found


def test_mean_over_directions_is_resampled_within_each():
    system = directions([0.2, 0.3, 0.4])
    mean = mean_of(system)
    assert mean.score == pytest.approx(np.mean([one.score for one in system]))
    for i in (0, 1, 999):
        assert mean.resamples[i] == pytest.approx(np.mean([one.resamples[i] for one in system]))
    # the mean of one direction is that direction
    other = directions([0.22, 0.3, 0.4], seed=5)
    assert p_value(mean_of(system[:1]), mean_of(other[:1])) == p_value(system[0], other[0])


def test_many_directions_tell_more_than_one():
    """Small differences add up."""
    system, baseline = directions([0.2, 0.2, 0.2]), directions([0.22, 0.22, 0.22], seed=7)
    alone = [p_value(*pair) for pair in zip(system, baseline)]
    assert p_value(mean_of(system), mean_of(baseline)) < min(alone)


def test_a_system_does_not_differ_from_itself():
    (system, *_), (same, *_) = directions([0.2, 0.2, 0.2]), directions([0.2, 0.2, 0.2])
    assert p_value(system, same) == 1.0


def test_thirty_directions_take_seconds():
    rng = np.random.default_rng(0)
    metric, bootstrap = bleu(), Bootstrap()
    statistics = [np.sort(rng.integers(1, 30, size=(1000, 10)))[:, ::-1] for _ in range(60)]
    started = time.process_time()
    found = [bootstrap.resample(metric, rows) for rows in statistics]
    p_value(mean_of(found[:30]), mean_of(found[30:]))
    assert time.process_time() - started < 10
