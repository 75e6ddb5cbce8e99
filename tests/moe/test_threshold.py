"""The threshold gate (XMoE): the selection, and blocks against the token-by-token reference."""

from functools import partial

import pytest
import systems_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems_reference import assert_block_is, balance, choose_by_threshold
from test_doors import model_options

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.dispatch import sum_in_order
from fairseq_smoe.moe.doors import check_kinds
from fairseq_smoe.moe.gate import BALANCE_LOSS
from fairseq_smoe.moe.gates.threshold import ThresholdGate, ThresholdOptions
from fairseq_smoe.moe.routing import select_top_p

D, F = 5, 6
THRESHOLDS = st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
STRATA = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def make_block(strata, thresholds, weights="raw", seed=0, peak=1.0, **options):
    """A block in float64 whose gates' logits are ``peak`` times as large as at the start."""
    torch.manual_seed(seed)
    text = ",".join(map(str, thresholds))
    gate = partial(ThresholdGate, options=ThresholdOptions(text, weights))
    block = SMoEBlock(D, F, strata, make_gate=gate, **options)
    with torch.no_grad():
        for gate in block.gates:
            gate.weight *= peak
    return block.double()


# --------------------------------------------------------------------------------------
# the selection


def probabilities(seed, num_tokens, num_experts, peak, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (peak * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype).softmax(1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 12),
    peak=st.sampled_from([0.0, 1.0, 10.0]),
    threshold=THRESHOLDS,
)
def test_no_more_experts_than_the_threshold_needs(seed, num_tokens, num_experts, peak, threshold):
    p_TE = probabilities(seed, num_tokens, num_experts, peak)
    taken_TE = select_top_p(p_TE, threshold)
    assert taken_TE.shape == p_TE.shape
    for p_E, taken_E in zip(p_TE, taken_TE):
        assert taken_E[p_E.argmax()]
        mass, least = p_E[taken_E].sum(), p_E[taken_E].min()
        assert mass >= threshold - 1e-12
        if threshold == 1:
            assert taken_E.all()
        elif taken_E.sum() > 1:
            assert mass - least < threshold + 1e-12
            assert taken_E.all() or least >= p_E[~taken_E].max()
    for more in (0.3, 0.5, 0.9, 0.99, 1.0):
        if more > threshold:
            assert (select_top_p(p_TE, more) | ~taken_TE).all()


def test_threshold_1_takes_all_where_the_sum_reaches_1_early():
    p_TE = torch.tensor([[50.0, 0.0, 1.0]]).softmax(1)
    assert p_TE[0, 0] == 1
    assert select_top_p(p_TE, 1).tolist() == [[True] * 3]
    assert select_top_p(p_TE, 0.999).tolist() == [[True, False, False]]


def test_equal_probabilities_go_to_the_first_experts():
    assert select_top_p(torch.full((2, 4), 0.25), 0.5).tolist() == [[True, True, False, False]] * 2


# --------------------------------------------------------------------------------------
# the block


@settings(deadline=None, max_examples=60)
@given(data=st.data(), strata=STRATA, seed=st.integers(0, 1000), training=st.booleans())
def test_agrees_with_the_reference(data, strata, seed, training):
    """Each stratum with a threshold of its own. With a large peak, some experts are not visited."""
    thresholds = data.draw(st.lists(THRESHOLDS, min_size=len(strata), max_size=len(strata)))
    weights = data.draw(st.sampled_from(["raw", "renormalised"]))
    padding = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=8)))
    peak = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    block = make_block(strata, thresholds, weights, seed, peak).train(training)
    x = torch.randn(len(padding), D, dtype=torch.float64)
    assert_block_is(
        block,
        x,
        padding,
        choose_by_threshold(block, thresholds, weights == "renormalised"),
        partial(systems_reference.ffn, block.experts),
        {BALANCE_LOSS: balance},
    )


@pytest.mark.parametrize("strata", [(6,), (2, 3)])
def test_threshold_0_is_switch_with_raw_weights(strata):
    """Bit for bit, in training as well, where top-k without capacity drops nothing."""
    torch.manual_seed(0)
    switch = SMoEBlock(D, F, strata, top_k=1, capacity_factor=None)
    block = make_block(strata, [0.0]).float()
    block.load_state_dict(switch.state_dict())
    results = []
    for model in (switch, block):
        x = torch.linspace(-1, 2, 40 * D).view(40, D).sin().requires_grad_()
        y, stats = model(x)
        (y.square().sum() + stats.balance_loss).backward()
        results.append([y, stats.balance_loss, x.grad, *(p.grad for p in model.parameters())])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)


def test_threshold_1_renormalised_weighs_all_experts():
    block = make_block((4,), [1.0], "renormalised").eval()
    _, stats = block(torch.randn(7, D, dtype=torch.float64))
    (record,) = stats.gates
    assert len(record.expert_C) == 7 * 4
    raw = make_block((4,), [1.0]).eval()
    x = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(block(x)[0], raw(x)[0])  # the sum over all is 1


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
def test_translation_does_not_depend_on_the_batch(weights):
    block = make_block((3, 3), [0.9, 0.5], weights, peak=3.0).eval()
    x = torch.randn(30, D, dtype=torch.float64)
    y = block(x)[0]
    torch.testing.assert_close(torch.cat([block(t)[0] for t in x.split(1)]), y)
    assert torch.equal(block(x)[0], y)


@pytest.mark.parametrize("weights", ["raw", "renormalised"])
def test_tokens_carried_along_do_not_count(weights):
    """grouped_mm keeps the tokens that are elsewhere in its tensors; the loop takes them out."""
    torch.manual_seed(0)
    make = partial(ThresholdGate, options=ThresholdOptions("0.7", weights))
    x, mask = torch.randn(4, 9, 16), torch.rand(4, 9) < 0.3
    results = []
    for backend in ("loop", "grouped_mm"):
        block = SMoEBlock(16, 32, (3, 2, 3), make_gate=make, expert_backend=backend)
        torch.manual_seed(1)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        y, stats = block(x.requires_grad_(), mask)
        (y.square().sum() + stats.balance_loss).backward()
        visits = [int(gate.num_visits) for gate in stats.gates]
        gradients = [p.grad for p in block.parameters()]
        results.append([y, stats.balance_loss, torch.tensor(visits), *gradients])
    for loop, grouped in zip(*results, strict=True):
        torch.testing.assert_close(loop, grouped, rtol=1e-4, atol=1e-4)


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 6), max_size=30), seed=st.integers(0, 1000))
def test_rows_of_a_token_add_up_in_their_order(tokens, seed):
    """As GPUs compute it in evaluation, where the order would be any otherwise. In float32, where
    the order shows."""
    generator = torch.Generator().manual_seed(seed)
    rows_ND = torch.randn(len(tokens), 3, generator=generator) * 10.0 ** torch.randint(
        -4, 5, (len(tokens), 1), generator=generator
    )
    expected = torch.zeros(7, 3)
    for row, token in zip(rows_ND, tokens):
        expected[token] += row
    token_N = torch.tensor(tokens, dtype=torch.long)
    assert torch.equal(sum_in_order(rows_ND, token_N, 7), expected)
    if not tokens:
        assert sum_in_order(rows_ND, token_N, 0).shape == (0, 3)


def test_flops_count_the_experts_that_even_probabilities_need():
    block = make_block((6, 4), [0.9, 0.5])
    assert block.expected_choices() == [9, 2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_threshold": "1.5"}, "--moe-threshold 1.5: expected numbers from 0 to 1"),
        ({"moe_threshold": "nan"}, "--moe-threshold nan: expected numbers from 0 to 1"),
        ({"moe_threshold": "0.5;1"}, "--moe-threshold 0.5;1: expected numbers from 0 to 1"),
        ({"moe_threshold": "0.9,0.5,0.1"}, "expected one number, or one for each of the 2 strata"),
        ({"moe_threshold_weights": "sum"}, "--moe-threshold-weights sum: expected raw or"),
        (
            {"moe_top1_expert": True},
            "--moe-top1-expert with --moe-gate threshold: .*--moe-threshold 0 for one",
        ),
        ({"moe_capacity_factor": 1.0}, "--moe-capacity-factor 1.0 with --moe-gate threshold"),
        ({"moe_gate": "top-k", "moe_threshold": "0.5"}, "needs --moe-gate threshold"),
    ],
)
def test_refusals(changes, message):
    options = model_options(**{"moe_gate": "threshold", **changes})
    with pytest.raises(OptionError, match=message) as error:
        check_kinds(options, (2, 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0.9", "0.9,0.5", 0.5, "1"])
def test_accepted(value):
    check_kinds(model_options(moe_gate="threshold", moe_threshold=value), (2, 2))
