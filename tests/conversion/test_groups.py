"""Which experts are alike, which are grouped, and which hidden units belong together."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.conversion import grouping
from fairseq_smoe.conversion.alignment import align, matching, units
from fairseq_smoe.conversion.grouping import MOST, group, partitions, score
from fairseq_smoe.conversion.similarity import LinearCKA, weight_similarity

SEEDS = st.integers(0, 10**6)


def randn(seed, *shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------
# similarity of outputs


def cka(*outputs, batch=None):
    streaming = LinearCKA(len(outputs), outputs[0].shape[1])
    for rows in zip(*(x.split(batch or max(len(x), 1)) for x in outputs)):
        streaming.add(list(rows))
    return streaming.matrix()


def direct(x, y):
    """From the definition, over Gram matrices of tokens (Kornblith et al. 2019, eq. 3)."""
    centring = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    k, m = (centring @ (z @ z.t()) @ centring for z in (x, y))
    return ((k * m).sum() / (k.norm() * m.norm())).item()


def orthogonal(seed, size):
    return torch.linalg.qr(randn(seed, size, size))[0]


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, factor=st.floats(0.01, 100), offset=st.floats(-10, 10))
def test_rotated_scaled_and_shifted_outputs_are_alike(seed, factor, offset):
    x = randn(seed, 40, 6)
    matrix = cka(x, x, factor * x @ orthogonal(seed + 1, 6) + offset)
    np.testing.assert_allclose(matrix, 1, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, num_tokens=st.integers(2, 50), batch=st.integers(1, 60), mean=st.floats(0, 30))
def test_the_sum_over_batches_is_the_definition(seed, num_tokens, batch, mean):
    outputs = [randn(seed + i, num_tokens, 4) + mean * i for i in range(3)]
    outputs[2] = outputs[2] + outputs[0]
    matrix = cka(*outputs, batch=batch)
    expected = [[direct(x, y) for y in outputs] for x in outputs]
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=1e-9)
    # in the precision of models, with a mean that is large beside the differences
    single = cka(*(x.float() for x in outputs), batch=batch)
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-4)


def test_constant_outputs_are_alike_and_unlike_others():
    """Adapters that have not been trained give zero."""
    zero = torch.zeros(30, 4, dtype=torch.float64)
    matrix = cka(zero, randn(0, 30, 4), zero + 3)
    assert matrix.round(9).tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert LinearCKA(2, 4).matrix().tolist() == [[1, 1], [1, 1]], "no tokens"


def test_memory_of_the_sums_is_that_stated():
    sums = LinearCKA(5, 7)
    kept = sum(t.numel() * t.element_size() for t in sums._products)
    assert kept == LinearCKA.num_bytes(5, 7)


# --------------------------------------------------------------------------------------
# similarity of weights


def experts(seed, number, dim=5, hidden=7, dtype=torch.float32):
    """Stacked parameters of two layers."""
    shapes = (dim, hidden), (hidden,), (hidden, dim), (dim,)
    return [randn(seed + i, number, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def shuffled(tensors, e, order):
    """Put the hidden units of one expert into another order, in place."""
    w1, b1, w2, _ = tensors
    w1[e], b1[e], w2[e] = w1[e][:, order], b1[e][order], w2[e][order]


def test_weights_are_compared_number_by_number():
    tensors = experts(0, 3)
    flat = [torch.cat([t[e].flatten() for t in tensors]) for e in range(3)]
    expected = [[-(a - b).square().mean().item() for b in flat] for a in flat]
    np.testing.assert_allclose(weight_similarity(tensors), expected, rtol=1e-5)
    products = [tensors[0][e] @ tensors[2][e] for e in range(3)]
    expected = [[-(a - b).square().mean().item() for b in products] for a in products]
    np.testing.assert_allclose(weight_similarity(tensors, surrogate=True), expected, rtol=1e-5)
    without_biases = [tensors[0], None, tensors[2], None]
    assert weight_similarity(without_biases).shape == (3, 3)


def test_the_surrogate_does_not_see_the_order_of_units():
    tensors = experts(0, 2)
    for t in tensors:
        t[1] = t[0]
    shuffled(tensors, 1, torch.randperm(7, generator=torch.Generator().manual_seed(0)))
    assert weight_similarity(tensors)[0, 1] < -0.1
    assert weight_similarity(tensors, surrogate=True)[0, 1] == pytest.approx(0, abs=1e-10)


# --------------------------------------------------------------------------------------
# groups


def similarities(seed, number):
    noise = np.random.default_rng(seed).random((number, number))
    return (noise + noise.T) / 2


def plain_score(similarity, labels):
    pairs = list(itertools.combinations(range(len(labels)), 2))
    inside = [similarity[i, j] for i, j in pairs if labels[i] == labels[j]]
    between = [similarity[i, j] for i, j in pairs if labels[i] != labels[j]]
    return (np.mean(inside) if inside else 0) - (np.mean(between) if between else 0)


@settings(deadline=None, max_examples=25)
@given(seed=SEEDS, number=st.integers(1, 6), data=st.data())
def test_the_best_of_all_partitions_is_found(seed, number, data):
    parts = data.draw(st.integers(1, number))
    similarity = similarities(seed, number)
    groups = group(similarity, parts)
    assert sorted(e for members in groups for e in members) == list(range(number))
    assert len(groups) == parts and all(groups)
    assert [members[0] for members in groups] == sorted(members[0] for members in groups)
    every = itertools.product(range(parts), repeat=number)
    best = max(plain_score(similarity, labels) for labels in every if len(set(labels)) == parts)
    assert score(similarity, groups) == pytest.approx(best, abs=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS, number=st.integers(2, MOST), data=st.data())
def test_all_partitions_are_at_least_as_good_as_linkage(seed, number, data):
    parts = data.draw(st.integers(1, number))
    similarity = similarities(seed, number)
    linked = grouping.by_linkage(similarity, parts)
    assert sorted(e for members in linked for e in members) == list(range(number))
    assert len(linked) == parts
    assert score(similarity, group(similarity, parts)) >= score(similarity, linked) - 1e-5


def test_number_of_partitions():
    """Stirling's numbers, which add up to Bell's."""
    assert len(list(partitions(8, 3))) == 966
    counts = [len(set(partitions(7, parts))) for parts in range(1, 8)]
    assert sum(counts) == 877
    assert math.comb(7, 2) == counts[-2]


@pytest.mark.parametrize("number", [MOST, 24])
def test_clusters_are_found(number):
    """Also of more experts than all of whose partitions are tried."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(number) % 4)
    alike = labels[:, None] == labels
    noise = rng.uniform(-0.1, 0.1, (number, number))
    found = group(0.3 + 0.5 * alike + (noise + noise.T) / 2, 4)
    assert {frozenset(labels[members]) for members in found} == {frozenset([i]) for i in range(4)}


def test_equal_experts_are_grouped_in_order_whatever_the_noise():
    """As those of a model that has just been made from a dense one."""
    expected = group(np.ones((8, 8)), 6)
    assert expected == [[0, 1, 2], [3], [4], [5], [6], [7]]
    for seed in range(5):
        noise = 1e-8 * np.random.default_rng(seed).standard_normal((8, 8))
        assert group(1 + noise + noise.T, 6) == expected


# --------------------------------------------------------------------------------------
# hidden units


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS)
def test_shuffled_copies_are_aligned_exactly(seed):
    tensors = experts(seed, 4)
    original = [t[1].clone() for t in tensors]
    generator = torch.Generator().manual_seed(seed)
    for e in (0, 3):
        for t in tensors:
            t[e] = t[1]
        shuffled(tensors, e, torch.randperm(7, generator=generator))
    before = [t.clone() for t in tensors]
    aligned = align(tensors, [[0, 1, 3], [2]], [1, 2])
    for t, own, given_, old in zip(aligned, original, tensors, before):
        for e in (0, 1, 3):
            assert torch.equal(t[e], own)
        assert torch.equal(t[2], old[2])
        assert torch.equal(given_, old), "what was given has not changed"


def test_alignment_is_the_nearest_of_all_orders():
    first, second = units(experts(0, 2, hidden=5), 0), units(experts(9, 2, hidden=5), 1)
    order = matching(first, second)
    distances = {
        p: (first - second[list(p)]).square().sum().item() for p in itertools.permutations(range(5))
    }
    assert distances[tuple(order.tolist())] == pytest.approx(min(distances.values()))


def test_experts_without_biases_are_aligned():
    w1, _, w2, _ = experts(0, 2)
    w1[1], w2[1] = w1[0].flip(1), w2[0].flip(0)
    aligned = align([w1, None, w2, None], [[0, 1]], [0])
    assert torch.equal(aligned[0][1], w1[0]) and torch.equal(aligned[2][1], w2[0])
    assert aligned[1] is None and aligned[3] is None
