"""Experts of different widths (HMoE): sizes, blocks against the reference, losses, padding."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from systems_reference import (
    assert_block_is,
    balance,
    choose_by_threshold,
    choose_top_k,
    entropy,
    p_penalty,
    sized_ffn,
)
from test_doors import build, model_options
from test_expert_group import check_gathered, compare

from fairseq_smoe.accounting.flops import count_parameters
from fairseq_smoe.accounting.scaling import Block
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.doors import check_kinds
from fairseq_smoe.moe.expert_kinds.sized import ENTROPY, PENALTY, SizedExperts, SizedOptions
from fairseq_smoe.moe.gate import BALANCE_LOSS
from fairseq_smoe.moe.gates.threshold import ThresholdGate, ThresholdOptions
from fairseq_smoe.moe.gates.top_k import TopKGate, TopKOptions
from fairseq_smoe.moe.routing import balance_loss, parameter_penalty, router_entropy
from fairseq_smoe.moe.widths import SCHEDULES, read_widths, scheduled_widths

D, F = 5, 6


def sized(dims=None, **options):
    return partial(SizedExperts, options=SizedOptions(moe_ffn_dims=dims, **options))


def as_dims(widths, strata):
    numbers = iter(map(str, widths))
    return "/".join(",".join(next(numbers) for _ in range(size)) for size in strata)


# --------------------------------------------------------------------------------------
# the sizes


def test_sizes_of_the_paper():
    assert scheduled_widths("arithmetic", 8, 2048) == list(range(1152, 2945, 256))
    assert scheduled_widths("hybrid", 8, 64) == [32] * 4 + [64] * 2 + [128] * 2
    assert scheduled_widths("geometric", 8, 255) == [8 * 2**i for i in range(8)]


@settings(deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    num_experts=st.integers(1, 33),
    eighth=st.integers(1, 600),
)
def test_scheduled_sizes_keep_the_total(schedule, num_experts, eighth):
    widths = scheduled_widths(schedule, num_experts, 8 * eighth)
    assert len(widths) == num_experts and sum(widths) == num_experts * 8 * eighth
    assert all(width >= 8 and width % 8 == 0 for width in widths)
    assert widths[0] <= widths[-1]


def test_scope_of_a_schedule():
    options = SizedOptions(moe_size_schedule="arithmetic", moe_size_scope="block")
    assert options.widths((4, 4), 2048) == list(range(1152, 2945, 256))
    halves = SizedOptions(moe_size_schedule="arithmetic").widths((4, 4), 2048)
    assert halves == 2 * scheduled_widths("arithmetic", 4, 2048)
    assert SizedOptions().widths((4, 4), 2048) == halves


def test_lists_of_sizes():
    assert read_widths("64,192/128", (2, 3)) == [64, 192, 128, 128, 128]
    assert read_widths(100, (4,)) == [100] * 4


# --------------------------------------------------------------------------------------
# the block


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    strata=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
    activation=st.sampled_from([torch.relu, torch.nn.functional.relu, torch.tanh]),
)
def test_agrees_with_the_reference(data, strata, seed, activation):
    """With top-p and top-k; outputs, both losses, and all gradients, zero for padding."""
    widths = data.draw(st.lists(st.integers(1, 7), min_size=sum(strata), max_size=sum(strata)))
    padding = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=8)))
    threshold = data.draw(st.sampled_from([None, 0.3, 0.6, 1.0]))
    top_k = data.draw(st.sampled_from([1, 2]))
    weights = data.draw(st.sampled_from([(0.1, 0.03), (0.0, 0.03), (0.1, 0.0)]))
    peak = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    if threshold is None:
        gate = partial(TopKGate, options=TopKOptions(top_k == 1, "all", 0))
    else:
        gate = partial(ThresholdGate, options=ThresholdOptions(str(threshold), "renormalised"))
    penalty_weight, entropy_weight = weights
    experts = sized(
        as_dims(widths, strata), moe_p_penalty=penalty_weight, moe_router_entropy=entropy_weight
    )
    torch.manual_seed(seed)
    block = SMoEBlock(
        D, F, strata, make_gate=gate, make_experts=experts, activation_fn=activation
    ).double()
    with torch.no_grad():
        for gate in block.gates:
            gate.weight *= peak
    choose = choose_top_k(block, top_k)
    if threshold is not None:
        choose = choose_by_threshold(block, [threshold] * len(strata), renormalised=True)
    losses = {BALANCE_LOSS: balance}
    losses |= {PENALTY: p_penalty(widths)} if penalty_weight else {}
    losses |= {ENTROPY: entropy} if entropy_weight else {}
    assert_block_is(
        block,
        torch.randn(len(padding), D, dtype=torch.float64),
        padding,
        choose,
        partial(sized_ffn, block.experts, widths, activation=activation),
        losses,
    )


@pytest.mark.parametrize("kind", [SMoEBlock, StackedMoEBlock])
def test_equal_sizes_are_the_plain_experts(kind):
    """Bit for bit: parameters from the same seed, outputs, gradients; names in checkpoints."""
    results = []
    for make_experts in (None, sized("16/16")):
        torch.manual_seed(0)
        block = kind(D, 16, (2, 3), make_experts=make_experts)
        x = torch.linspace(-1, 2, 40 * D).view(40, D).sin().requires_grad_()
        y, stats = block(x)
        (y.square().sum() + stats.balance_loss).backward()
        named = dict(block.named_parameters())
        results.append((block.state_dict().keys(), [y, x.grad, *(p.grad for p in named.values())]))
    (names, theirs), (own_names, ours) = results
    assert names == own_names
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)


def test_gradients_end_with_the_hidden_units_and_padding_stays_zero():
    """Under Adam with weight decay and clipping, over several passes and updates; also where an
    expert gets no token."""
    widths = (2, 7, 4, 1)
    torch.manual_seed(0)
    block = SMoEBlock(D, F, (2, 2), make_experts=sized(as_dims(widths, (2, 2))))
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1, weight_decay=0.1)
    before = [p.clone() for p in block.parameters()]
    for _ in range(5):
        y, stats = block(torch.randn(9, D))
        optimizer.zero_grad()
        y.square().sum().backward()
        torch.nn.utils.clip_grad_norm_(block.parameters(), 0.5)
        optimizer.step()
    experts = block.experts
    for e, width in enumerate(widths):
        for absent in (
            experts.fc1_weight[e, :, width:],
            experts.fc1_bias[e, width:],
            experts.fc2_weight[e, width:],
        ):
            assert not absent.any()
    changed = [bool((a != b).any()) for a, b in zip(before, block.parameters())]
    assert all(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Gate and losses compute in float32; padding stays without a gradient."""
    torch.manual_seed(0)
    gate = partial(ThresholdGate, options=ThresholdOptions("0.6", "renormalised"))
    experts = sized("4,16/8,8", moe_router_entropy=0.03)
    block = SMoEBlock(8, 9, (2, 2), make_gate=gate, make_experts=experts).to(dtype)
    y, stats = block(torch.randn(20, 8, dtype=dtype))
    assert y.dtype == dtype
    assert {loss.dtype for loss in stats.losses.values()} == {torch.float32}
    (y.float().square().sum() + sum(stats.losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())
    assert block.experts.fc1_weight.grad[0, :, :4].any()
    assert not block.experts.fc1_weight.grad[0, :, 4:].any()


def test_experts_start_like_dense_ones_of_their_width():
    torch.manual_seed(0)
    experts = SizedExperts((2,), 64, 128, SizedOptions(moe_ffn_dims="16,256"))
    for e, width in enumerate((16, 256)):
        bound = width**-0.5
        assert 0.95 * bound < experts.fc2_weight[e, :width].abs().max() <= bound
        assert experts.fc2_bias[e].abs().max() <= bound
        assert 0.95 / 8 < experts.fc1_weight[e, :, :width].abs().max() <= 1 / 8


# --------------------------------------------------------------------------------------
# the losses


def scores(seed, num_tokens=30, num_experts=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


@pytest.mark.parametrize("here", [False, True])
def test_penalty_of_equal_sizes_and_one_choice_is_the_balance_loss(here):
    """Value and gradient."""
    logits = scores(0)
    here_T = torch.arange(30) % 3 > 0 if here else None
    results = []
    for penalty in (False, True):
        p_TE = logits.softmax(1)
        best_T = p_TE.argmax(1)
        loss = balance_loss(p_TE, best_T, here_T)
        if penalty:
            loss = parameter_penalty(p_TE, torch.arange(30), best_T, torch.tensor([8] * 5), here_T)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_penalty_is_lower_where_small_experts_are_used():
    width_E = torch.tensor([1, 2, 3, 4, 5])
    p_TE = torch.eye(5, dtype=torch.float64) * 0.8 + 0.04
    tokens = torch.arange(5)
    small = parameter_penalty(p_TE, tokens, tokens * 0, width_E)
    large = parameter_penalty(p_TE, tokens, tokens * 0 + 4, width_E)
    assert small < large


def test_a_step_down_the_entropy_lowers_it():
    logits = scores(1)
    loss = router_entropy(logits.softmax(1))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert router_entropy((logits - gradient).softmax(1)) < loss


def test_entropy_has_a_gradient_at_probability_0():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    p_TE = logits.softmax(1)
    assert p_TE[0, 1] == 0
    (gradient,) = torch.autograd.grad(router_entropy(p_TE), logits)
    assert gradient.isfinite().all()


def test_the_penalty_takes_the_place_of_the_balance_loss():
    for weight, expected in ((0.1, {PENALTY: 0.1, BALANCE_LOSS: 0.0}), (0.0, {})):
        block = SMoEBlock(D, F, (3,), make_experts=sized("1,2,3", moe_p_penalty=weight))
        _, stats = block(torch.randn(4, D))
        assert {name: w for name, w in stats.loss_weights.items() if name != ENTROPY} == expected


# --------------------------------------------------------------------------------------
# counting


def test_padding_is_not_counted():
    """Same total of hidden units, same number of parameters; a token uses those of its experts."""
    equal, other = (
        build(moe_experts=kind, moe_ffn_dims=dims)
        for kind, dims in (("ffn", None), ("sized", "2,8/1,9"))
    )
    assert count_parameters(other) == count_parameters(equal)
    assert other.experts.num_parameters() == equal.experts.num_parameters()
    stored = sum(p.numel() for p in other.experts.parameters())
    assert other.experts.num_stored() == stored > other.experts.num_parameters()
    per_unit, bias = 2 * 6 + 1, 6
    assert other.experts.params_used(range(2, 4), 2) == 2 * (5 * per_unit + bias)
    assert other.experts.params_used(range(2), 1) == 5 * per_unit + bias
    assert other.experts.hidden_dim() == 5
    wide_last = build(moe_experts="sized", moe_ffn_dims="2/8")
    # every token passes the first gate, half of them the second
    assert wide_last.experts.hidden_dim() == pytest.approx((1 * 5 + 0.5 * 8) / 1.5)
    assert Block.of(wide_last).expert_params == wide_last.experts.num_stored()


def shared_by_ranks(rank):
    widths = (3, 9, 4, 4, 16, 1, 2, 7)
    gate = partial(ThresholdGate, options=ThresholdOptions("0.6", "renormalised"))
    for size, strata in itertools.product((2, 4), ((4, 4), (2, 2, 2, 2))):
        experts = sized(as_dims(widths, strata))
        compare(rank, size, strata=strata, make_experts=experts, make_gate=gate)
        compare(rank, size, strata=strata, make_gate=gate)
    check_gathered(rank, make_experts=sized("3,9,4,4/16,1,2,7"))


def test_ranks_that_share_experts_compute_what_one_computes():
    run_ranks(shared_by_ranks, 4)


# --------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_ffn_dims": "8,8"}, "does not fit the strata 2-2; expected 2 lists"),
        ({"moe_ffn_dims": "8,8,8/8"}, "does not fit the strata 2-2; expected 2 lists"),
        ({"moe_ffn_dims": "8,0/8"}, "--moe-ffn-dims 8,0/8: expected numbers of hidden units"),
        ({"moe_ffn_dims": "8/a"}, "--moe-ffn-dims 8/a: expected numbers of hidden units"),
        ({"moe_size_schedule": "linear"}, "--moe-size-schedule linear: expected arithmetic or"),
        ({"moe_size_scope": "model"}, "--moe-size-scope model: expected stratum or block"),
        (
            {"moe_ffn_dims": "8/8", "moe_size_schedule": "hybrid"},
            "--moe-ffn-dims 8/8 and --moe-size-schedule hybrid contradict each other",
        ),
        ({"moe_ffn_dims": "8/8", "moe_ffn_split": 2}, "--moe-ffn-dims 8/8 with --moe-ffn-split 2"),
        ({"moe_ffn_dims": "8/8", "moe_ffn_dim": 16}, "--moe-ffn-dims 8/8 with --moe-ffn-dim 16"),
        ({"moe_expert_backend": "grouped_mm"}, "grouped_mm with --moe-experts sized"),
        ({"moe_gate": "top-any"}, "--moe-p-penalty 0.1 with --moe-gate top-any"),
        ({"moe_p_penalty": -1.0}, "--moe-p-penalty -1.0: expected 0 or more"),
        ({"moe_router_entropy": float("nan")}, "--moe-router-entropy nan: expected 0 or more"),
        ({"moe_experts": "ffn", "moe_router_entropy": 0.1}, "needs --moe-experts sized"),
        ({"moe_experts": "ffn", "moe_ffn_dims": "8/8"}, "needs --moe-experts sized"),
        ({"moe_experts": "ffn", "moe_size_schedule": "hybrid"}, "needs --moe-experts sized"),
    ],
)
def test_refusals(changes, message):
    options = model_options(**{"moe_experts": "sized", **changes})
    with pytest.raises(OptionError, match=message) as error:
        check_kinds(options, (2, 2))
    assert "\n" not in str(error.value)


def test_sizes_that_are_no_multiples_of_eight():
    with pytest.raises(OptionError, match="3 experts of 5 hidden units cannot be divided"):
        SizedExperts((3,), D, 5)
