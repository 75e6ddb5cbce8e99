"""Dividing hidden units among small experts, and the routers that choose among these."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.conversion.moefy import router
from fairseq_smoe.conversion.moefy.samples import Sample
from fairseq_smoe.conversion.moefy.split import (
    assign_equally,
    balanced_graph_parts,
    balanced_k_means,
    co_activation,
    split,
)

HOW = ("cluster", "graph", "random")


def make(units, dim, tokens, seed):
    torch.manual_seed(seed)
    return torch.randn(units, dim), torch.randn(units), torch.randn(tokens, dim)


# --------------------------------------------------------------------------------------
# partitions


@settings(deadline=None, max_examples=40)
@given(
    how=st.sampled_from(HOW),
    experts=st.integers(2, 6),
    width=st.integers(1, 8),
    tokens=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_parts_are_disjoint_equal_and_cover_all(how, experts, width, tokens, seed):
    units = experts * width
    arguments = (how, *make(units, 5, tokens, seed), experts, seed)
    order = split(*arguments)
    assert sorted(order.tolist()) == list(range(units))
    assert torch.equal(order, split(*arguments))  # the same draw gives the same
    inside = order.view(experts, width)
    assert torch.equal(inside, inside.sort(dim=1).values)


def test_clusters_that_are_there_are_found():
    centres = np.eye(4, 16, dtype=np.float32)
    rng = np.random.default_rng(0)
    of = rng.permutation(np.repeat(range(4), 8))
    vectors = centres[of] + rng.normal(0, 0.05, (32, 16)).astype(np.float32)
    found = [balanced_k_means(vectors, 4, np.random.default_rng(seed)) for seed in range(5)]
    best = min(found, key=lambda cluster: spread(vectors, cluster))
    assert len({*zip(of, best)}) == 4


def spread(vectors, cluster):
    """Sum of squared distances from the centres."""
    parts = [vectors[cluster == p] for p in set(cluster)]
    return sum(((part - part.mean(0)) ** 2).sum() for part in parts)


def test_clusters_are_tighter_than_random_parts():
    vectors = F.normalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).numpy()
    rng = np.random.default_rng(0)
    found = spread(vectors, balanced_k_means(vectors, 8, rng))
    assert found < 0.8 * min(spread(vectors, rng.permutation(64) % 8) for _ in range(20))


@settings(deadline=None, max_examples=30)
@given(places=st.integers(1, 3), seats=st.integers(1, 2), seed=st.integers(0, 1000))
def test_assignment_is_the_best_of_equal_sizes(places, seats, seed):
    from itertools import permutations

    value = np.random.default_rng(seed).normal(size=(places * seats, places))
    found = assign_equally(value)
    assert (np.bincount(found, minlength=places) == seats).all()
    rows = np.arange(len(value))
    best = max(value[rows, list(p)].sum() for p in permutations(np.repeat(range(places), seats)))
    assert value[rows, found].sum() == pytest.approx(best)


def test_units_that_are_active_together_come_together():
    units = torch.arange(24) % 3  # three groups, each active for tokens of its own kind
    weight = F.one_hot(units, 3).float() + 0.01 * torch.randn(24, 3)
    tokens = F.one_hot(torch.arange(60) % 3, 3).float()
    order = split("graph", weight, torch.full((24,), -0.1), tokens, 3, seed=0)
    assert all(len(set(units[part].tolist())) == 1 for part in order.view(3, 8))


def test_co_activation_is_the_sum_over_tokens():
    weight, bias, tokens = make(6, 5, 2100, seed=0)
    hidden = F.relu(F.linear(tokens, weight, bias))
    expected = torch.einsum("tn,tm->nm", hidden, hidden).fill_diagonal_(0)
    torch.testing.assert_close(co_activation(weight, bias, tokens), expected, rtol=1e-4, atol=1e-3)


def test_parts_that_metis_leaves_unequal_are_made_equal():
    """Two cliques of 10 and 6 units: two of the first go with the second."""
    together = np.zeros((16, 16), np.float32)
    together[:10, :10] = together[10:, 10:] = 1
    np.fill_diagonal(together, 0)
    part = balanced_graph_parts(together, 2)
    assert (np.bincount(part) == 8).all() and len(set(part[10:])) == 1


# --------------------------------------------------------------------------------------
# routers


@pytest.fixture(scope="module")
def network():
    """First layer in 8 small experts of 4 units, and 3000 tokens."""
    weight, bias, tokens = make(32, 12, 3000, seed=0)
    order = split("cluster", weight, bias - 1, tokens, 8, seed=0)
    return weight[order].view(8, 4, 12), (bias - 1)[order].view(8, 4), tokens


def test_a_trained_router_is_better_than_its_start(network):
    coverage = {}
    for select in ("mlp", "similarity", "oracle"):
        parameters, found = router.fit(select, *network, kept=2, seed=1)
        coverage[select] = {row["kept"]: row["router"] for row in found}
        assert all(row["router"] <= row["oracle"] + 1e-6 for row in found)
    assert [*coverage["mlp"]] == [1, 2, 4]
    assert coverage["oracle"][2] >= coverage["mlp"][2] > coverage["similarity"][2] + 0.02
    assert coverage["mlp"][2] > 0.8 * coverage["oracle"][2] and coverage["mlp"][2] > 2 * 2 / 8
    assert parameters == {}  # of the oracle


def test_fitting_is_deterministic(network):
    first, other = (router.fit("mlp", *network, kept=2, seed=1) for _ in range(2))
    assert first[1] == other[1]
    assert all(torch.equal(first[0][name], other[0][name]) for name in first[0])


def test_targets_are_those_of_raw_tokens_with_bias(network):
    """Only the router's own input is normalised: tokens of any length, which activate other
    experts because of the bias, are told apart where their direction differs."""
    weight, bias, tokens = network
    true = router._true_scores(weight, bias, tokens)
    hidden = torch.einsum("td,pwd->tpw", tokens, weight) + bias
    torch.testing.assert_close(true, hidden.clamp(min=0).sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_networks_that_few_tokens_came_to(network, tokens):
    """Without any, a router stays at its start."""
    weight, bias, all_tokens = network
    parameters, found = router.fit("mlp", weight, bias, all_tokens[:tokens], kept=2, seed=1)
    assert parameters["router_in"].shape == (8, 12) and parameters["router_out"].shape == (8, 8)
    assert len(found) == (3 if tokens else 0)
    if tokens < 2:
        assert torch.equal(parameters["router_out"], torch.eye(8))


# --------------------------------------------------------------------------------------
# samples


def test_every_token_has_the_same_chance(tmp_path):
    """20 of 100 tokens, which come in batches; 400 draws."""
    counts = np.zeros(100)
    for seed in range(400):
        path = tmp_path / f"{seed}"
        sample = Sample(path, 20, seed)
        for batch in torch.arange(100.0).unsqueeze(1).split([7, 30, 1, 0, 50, 12]):
            sample.offer(batch)
        kept = np.fromfile(path, np.float32)
        assert sample.offered == 100 and len(set(kept)) == 20
        counts[kept.astype(int)] += 1
    # standard deviation of each count: 8
    assert abs(counts - 80).max() < 5 * 8 and abs(counts[:20].mean() - 80) < 8
