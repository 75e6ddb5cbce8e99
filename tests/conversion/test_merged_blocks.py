"""Blocks whose experts have been merged, against the blocks that they were."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.conversion.learned_weights import learn_weights
from fairseq_smoe.conversion.merging import Layout, Merger
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.gates.threshold import ThresholdGate, ThresholdOptions
from fairseq_smoe.moe.gates.top_k import TopKGate, TopKOptions

D, F = 6, 8
CLOSE = {"rtol": 0, "atol": 1e-12}  # in float64; sums of other lengths round differently


def with_gate(kind, *options):
    def make(embed_dim, num_experts, bias=False):
        gate = kind(embed_dim, num_experts, options[0](*options[1:]))
        if bias:
            gate.add_bias()
        return gate

    return make


TOP_1 = with_gate(ThresholdGate, ThresholdOptions, "0", "renormalised")
ALL = with_gate(ThresholdGate, ThresholdOptions, "1", "raw")
TOP_2 = with_gate(TopKGate, TopKOptions)


def make_block(strata, gate, seed=0, bias=False, block_class=SMoEBlock):
    torch.manual_seed(seed)
    block = block_class(D, F, strata, make_gate=partial(gate, bias=bias)).double().eval()
    with torch.no_grad():
        for gate in block.gates:
            gate.weight *= 4  # so that tokens differ
    return block


def tokens(seed=1, number=200):
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed)).double()


def state_of(block):
    return {n: v for n, v in block.state_dict().items() if n.startswith(("gates", "experts"))}


def copied(block, copies, gate, bias=False):
    """A block with several copies of each expert and of its rows in the gates.

    Args:
        copies: of each expert.

    Returns:
        ``(block, groups of the copies)``
    """
    sources = [e for e, number in enumerate(copies) for _ in range(number)]
    strata = [sum(copies[e] for e in own) for own in Layout(block.strata, stacked=True).own]
    larger = make_block(tuple(strata), gate, seed=9, bias=bias, block_class=type(block))
    with torch.no_grad():
        for name, tensor in state_of(block).items():
            own = larger.get_parameter(name)
            if name.startswith("experts"):
                own.copy_(tensor[sources])
        for small, large, seen in zip(block.gates, larger.gates, block.visible):
            own = [e - seen.start for e in sources if e in seen]
            large.weight.copy_(small.weight[own])
        larger.norms.load_state_dict(block.norms.state_dict())
    groups = [[i for i, source in enumerate(sources) if source == e] for e in range(len(copies))]
    return larger, groups


def merged(block, groups, strata, gate, bias=False, weights=None):
    """The block with its experts merged."""
    stacked = isinstance(block, StackedMoEBlock)
    merger = Merger(Layout(block.strata, stacked), Layout(strata, stacked), groups, bias)
    weights = merger.equal_weights() if weights is None else weights
    smaller = make_block(strata, gate, seed=5, bias=bias, block_class=type(block))
    smaller.load_state_dict(block.state_dict() | merger.apply(state_of(block), weights))
    return smaller


# --------------------------------------------------------------------------------------
# copies


@pytest.mark.parametrize("strata, copies", [((4,), [2, 1, 2, 4]), ((2, 2), [2, 2, 1, 4])])
def test_copies_merge_exactly_with_one_renormalised_choice(strata, copies):
    """And the parameters are again those of which there were copies, bit by bit."""
    original = make_block(strata, TOP_1)
    larger, groups = copied(original, copies, TOP_1)
    smaller = merged(larger, groups, strata, TOP_1)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, smaller.state_dict()[name])
    x = tokens()
    (before, stats), (after, own) = larger(x), smaller(x)
    torch.testing.assert_close(after, before, **CLOSE)
    assert torch.equal(stats.passes, own.passes)


@pytest.mark.parametrize("strata, copies", [((4,), [2] * 4), ((2, 2), [2] * 4)])
def test_two_choices_of_copies_are_one_choice_of_the_merged(strata, copies):
    larger, groups = copied(make_block(strata, TOP_2), copies, TOP_2)
    smaller = merged(larger, groups, strata, TOP_1)
    x = tokens()
    torch.testing.assert_close(smaller(x)[0], larger(x)[0], **CLOSE)


def test_two_renormalised_choices_where_the_best_has_no_copy():
    """Where it has, the second choice was the copy, and is another expert afterwards."""
    original = make_block((5,), TOP_2)
    larger, groups = copied(original, [1, 3, 1, 2, 1], TOP_2)
    smaller = merged(larger, groups, (5,), TOP_2)
    x = tokens()
    (before, _), (after, stats) = larger(x), smaller(x)
    alone = torch.isin(stats.gates[0].best_T, torch.tensor([0, 2, 4]))
    assert 50 < alone.sum() < 150
    torch.testing.assert_close(after[alone], before[alone], **CLOSE)
    assert not torch.isclose(after[~alone], before[~alone]).all(dim=1).any()


def test_bias_keeps_the_full_softmax():
    original = make_block((4,), ALL)
    larger, groups = copied(original, [3, 1, 2, 1], ALL)
    x = tokens()
    before = larger(x)[0]
    exact = merged(larger, groups, (4,), ALL, bias=True)
    torch.testing.assert_close(exact(x)[0], before, **CLOSE)
    expected = torch.tensor([3.0, 1, 2, 1]).double().log()
    torch.testing.assert_close(exact.gates[0].logit_bias.detach(), expected)
    lossy = merged(larger, groups, (4,), ALL)(x)[0]
    assert (lossy - before).abs().max() > 0.05, "without it, the copies lose probability"
    single = exact.float()
    torch.testing.assert_close(
        single(x.float())[0], larger.float()(x.float())[0], atol=1e-6, rtol=0
    )


def test_bias_in_strata_and_twice():
    """With as many copies of each expert, the best stays the best. What is merged again keeps the
    probability of all."""
    original = make_block((2, 2), ALL)
    larger, _ = copied(original, [4] * 4, ALL)
    pairs = [[2 * g, 2 * g + 1] for g in range(8)]
    x = tokens()
    before, stats = larger(x)
    once = merged(larger, pairs, (4, 4), ALL, bias=True)
    twice = merged(once, pairs[:4], (2, 2), ALL, bias=True)
    for smaller in (once, twice):
        after, own = smaller(x)
        torch.testing.assert_close(after, before, **CLOSE)
        assert torch.equal(own.passes, stats.passes)
    assert twice.gates[1].logit_bias.tolist() == pytest.approx([math.log(4)] * 2)


def test_stacked_layers_merge_as_well():
    original = make_block((2, 3), TOP_1, block_class=StackedMoEBlock)
    larger, groups = copied(original, [2, 1, 2, 1, 1], TOP_1)
    assert larger.strata == (3, 4)
    smaller = merged(larger, groups, (2, 3), TOP_1)
    x = tokens()
    torch.testing.assert_close(smaller(x)[0], larger(x)[0], **CLOSE)


# --------------------------------------------------------------------------------------
# any experts


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), data=st.data())
def test_experts_and_their_rows_in_all_gates_have_the_same_weights(seed, data):
    """Plainly, with loops."""
    strata = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    groups = []
    for own in Layout(strata).own:
        labels = [data.draw(st.integers(0, len(own) - 1)) for _ in own]
        groups.append([[e for e, k in zip(own, labels) if k == label] for label in set(labels)])
    after = tuple(map(len, groups))
    groups = [members for of_stratum in groups for members in of_stratum]
    block = make_block(strata, TOP_2, seed)
    merger = Merger(Layout(strata), Layout(after), groups)
    weights_GE = merger.equal_weights()
    weights_GE *= torch.rand(weights_GE.shape, generator=torch.Generator().manual_seed(seed)) + 0.1
    weights_GE /= weights_GE.sum(1, keepdim=True)
    smaller = merged(block, groups, after, TOP_2, weights=weights_GE)
    for g, members in enumerate(groups):
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
            theirs, own = getattr(block.experts, name), getattr(smaller.experts, name)[g]
            expected = sum(weights_GE[g, e] * theirs[e] for e in members)
            torch.testing.assert_close(own, expected)
        for old, new, seen, now in zip(block.gates, smaller.gates, block.visible, smaller.visible):
            assert (g in now) == all(e in seen for e in members)
            if g in now:
                expected = sum(weights_GE[g, e] * old.weight[e - seen.start] for e in members)
                torch.testing.assert_close(new.weight[g - now.start], expected)
    for before, now in zip(block.norms.parameters(), smaller.norms.parameters()):
        assert torch.equal(before, now)


def test_weights_of_visits():
    merger = Merger(Layout((5,)), Layout((3,)), [[0, 2], [1, 4], [3]])
    visits_E = torch.tensor([1, 0, 3, 7, 0])
    assert merger.visit_weights(visits_E).tolist() == [
        [0.25, 0, 0.75, 0, 0],
        [0, 0.5, 0, 0, 0.5],  # nobody has come
        [0, 0, 0, 1, 0],
    ]
    assert merger.most_visited(visits_E) == [2, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_expert_alone_is_copied_bit_by_bit(dtype):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[1, 0] = -0.0
    merger = Merger(Layout((3,)), Layout((2,)), [[0, 2], [1]])
    state = {"gates.0.weight": weight, "experts.fc1_weight": weight}
    result = merger.apply(state, merger.equal_weights())
    for name in state:
        assert result[name].dtype == dtype
        assert result[name][1].view(torch.uint8).equal(weight[1].view(torch.uint8))
        expected = ((weight[0].float() + weight[2].float()) / 2).to(dtype)
        torch.testing.assert_close(result[name][0], expected)


# --------------------------------------------------------------------------------------
# learned weights


@pytest.mark.parametrize("strata", [(4,), (2, 2)])
def test_learned_weights_find_the_expert_that_counts(strata):
    """One of two experts that are merged is hardly visited: its share falls towards 0."""
    block = make_block(strata, TOP_2).float()
    groups = [[0, 1], *([e] for e in range(2, 4))]
    after = (sum(strata[:1]) - 1, *strata[1:])
    with torch.no_grad():
        for gate in block.gates[:1]:
            gate.weight[1] = gate.weight[0] * 0.5
        block.norms[0].bias.copy_(block.gates[0].weight[0])  # so expert 0 comes before expert 1
    merger = Merger(Layout(strata), Layout(after), groups)
    smaller = make_block(after, TOP_2).float()
    parts = [tokens(seed, 60).float() for seed in range(8)]
    learned = learn_weights(block, smaller, state_of(block), merger, parts, 30, 0.1)
    assert learned.error < 0.5 * learned.equal_error
    assert learned.weights_GE[0, 0] > 0.8
    torch.testing.assert_close(learned.weights_GE.sum(1), torch.ones(len(groups)))
    assert not learned.weights_GE[merger.equal_weights() == 0].any()
    # the error is that of the block that is made with them
    made = merged(block.double(), groups, after, TOP_2, weights=learned.weights_GE.double())
    held_out = torch.cat(parts[-2:]).double()
    expected = block(held_out)[0]
    error = (made(held_out)[0] - expected).square().sum() / (expected - held_out).square().sum()
    assert learned.error == pytest.approx(error.item(), rel=1e-4)


def test_equal_weights_are_kept_if_nothing_is_better():
    block = make_block((2,), TOP_1)
    larger, groups = copied(block, [2, 2], TOP_1)
    merger = Merger(Layout((4,)), Layout((2,)), groups)
    parts = [tokens(seed, 20) for seed in range(4)]
    learned = learn_weights(larger, block, state_of(larger), merger, parts, 3, 0.1)
    assert learned.epoch == 0 and learned.error == learned.equal_error < 1e-20
    assert torch.equal(learned.weights_GE, merger.equal_weights())
