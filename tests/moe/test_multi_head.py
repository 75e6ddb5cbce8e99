"""MH-MoE: its equations and invariants, one head, ranks, and what it goes together with."""

from argparse import Namespace

import pytest
import systems_reference
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_doors import model_options

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe import doors
from fairseq_smoe.moe.arrangements.cmr import CMRBlock
from fairseq_smoe.moe.arrangements.multi_head import MultiHeadBlock, num_heads
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_group import form_expert_group
from fairseq_smoe.moe.strata import visible_experts


def make(strata=(2, 2), heads=2, head_dim=3, residual="paper", seed=0, dtype=torch.double, **more):
    torch.manual_seed(seed)
    block = SMoEBlock(head_dim, 8, strata, **more)
    sublayer = MultiHeadBlock(block, heads * head_dim, heads, residual).to(dtype)
    with torch.no_grad():  # norms and biases away from their initial values
        for parameter in sublayer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return sublayer


def build(dim=8, strata=(2, 2), **changes):
    torch.manual_seed(0)
    return doors.build_sublayer(dim, 5, model_options(**changes), strata)


def gradients(loss, tensors):
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]


# --------------------------------------------------------------------------------------
# against the equations


def choose_top(block, k, scores):
    """``choose`` of the paper's gate, for ``systems_reference.run``; appends to ``scores``."""

    def choose(gate, h):
        first = sum(block.strata[:gate])
        probs = (block.gates[gate].weight @ h).softmax(0)
        scores[gate].append(probs)
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:k]
        total = sum(probs[e] for e in best) if len(best) > 1 else 1
        return {first + e: probs[e] / total for e in best}, first + best[0]

    return choose


def balance(scores):
    """Mean over the gates of E * sum of share and mean probability."""
    losses = []
    for of_gate in scores:
        if not of_gate:
            losses.append(0.0)
            continue
        probs_TE = torch.stack(of_gate)
        share_E = probs_TE.argmax(1).bincount(minlength=probs_TE.shape[1]).double() / len(probs_TE)
        losses.append(probs_TE.shape[1] * (share_E * probs_TE.mean(0)).sum())
    return sum(losses) / len(scores)


@settings(deadline=None, max_examples=60)
@given(
    strata=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    heads=st.integers(2, 4),
    head_dim=st.integers(2, 4),
    top_k=st.sampled_from([1, 2]),
    residual=st.sampled_from(["paper", "released"]),
    padding=st.lists(st.booleans(), min_size=1, max_size=5),
    unpopular=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_equations(
    strata, heads, head_dim, top_k, residual, padding, unpopular, seed
):
    sublayer = make(strata, heads, head_dim, residual, seed, top_k=top_k, capacity_factor=None)
    block = sublayer.block
    if unpopular:  # nobody takes the first expert
        with torch.no_grad():
            block.norms[0].weight.mul_(0.01)
            block.norms[0].bias.fill_(1)
            block.gates[0].weight[0] = -100
    padding = torch.tensor(padding)
    x = torch.randn(len(padding), heads * head_dim, dtype=torch.double, requires_grad=True)
    y, stats = sublayer(x, padding)

    scores = [[] for _ in strata]

    def run_block(parts):
        return systems_reference.run(
            block,
            parts,
            choose_top(block, top_k, scores),
            lambda e, h: systems_reference.ffn(block.experts, e, h),
        )

    real = [t for t in range(len(x)) if not padding[t]]
    expected, passes = [*x], torch.zeros(len(x), heads, dtype=torch.long)
    if real:
        out, found = systems_reference.multi_head(sublayer, [x[t] for t in real], run_block)
        for t, token, own in zip(real, out, torch.tensor(found.passes).view(-1, heads)):
            expected[t], passes[t] = token, own
        assert sum(gate.num_visits for gate in stats.gates) == sum(found.visits)
    assert stats.heads == heads
    assert torch.equal(stats.passes, passes)
    loss = balance(scores)
    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, torch.stack(expected), **close)
    torch.testing.assert_close(stats.balance_loss, torch.as_tensor(loss).double(), **close)
    target = torch.randn_like(y)
    tensors = [x, *sublayer.parameters()]
    ours = gradients((y * target).sum() + stats.balance_loss, tensors)
    theirs = gradients((torch.stack(expected) * target).sum() + loss, tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close)


# --------------------------------------------------------------------------------------
# invariants


def test_one_head_is_the_plain_block():
    plain, one = build(), build(moe_heads=1, moe_arrangement="multi-head")
    assert type(one) is SMoEBlock
    assert list(plain.state_dict()) == list(one.state_dict())
    x, outputs = torch.randn(2, 5, 8), []
    for block in (plain, one):
        torch.manual_seed(1)  # the second expert is drawn
        y, stats = block.train()(x)
        outputs.append(y)
        assert stats.passes.shape == (2, 5) and stats.heads == 1
    assert torch.equal(*outputs)


def test_without_projections_heads_are_independent():
    sublayer = make((2, 2), heads=3, residual="released")
    with torch.no_grad():
        for linear in (sublayer.head, sublayer.merge):
            linear.weight.copy_(torch.eye(9))
            linear.bias.zero_()
    x = torch.randn(11, 9, dtype=torch.double)
    chunks = sublayer.norm(x).chunk(3, dim=1)
    expected = x + torch.cat([sublayer.block.eval()(c)[0] - c for c in chunks], dim=1)
    torch.testing.assert_close(sublayer.eval()(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strata", [(4,), (2, 2)])
def test_experts_that_give_nothing_leave_the_bias(strata):
    sublayer = make(strata, residual="released")
    with torch.no_grad():
        sublayer.block.experts.fc2_weight.zero_()
        sublayer.block.experts.fc2_bias.zero_()
    x = torch.randn(7, 6, dtype=torch.double)
    torch.testing.assert_close(sublayer(x)[0] - x, sublayer.merge.bias.expand(7, 6))


@pytest.mark.parametrize("strata", [(4,), (2, 2), (1, 2, 1)])
def test_translation_does_not_depend_on_the_batch(strata):
    sublayer = make(strata).eval()
    x = torch.randn(13, 6, dtype=torch.double)
    y, stats = sublayer(x)
    order = torch.randperm(13)
    torch.testing.assert_close(sublayer(x[order])[0], y[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sublayer(x[3:4])[0], y[3:4], rtol=1e-12, atol=1e-12)
    assert torch.equal(sublayer(x)[0], y)
    assert all(gate.kept_C is None for gate in stats.gates)


def test_padding_covers_the_heads_and_takes_no_room():
    sublayer = make((2, 2), capacity_factor=0.5).train()
    x = torch.randn(3, 4, 6, dtype=torch.double)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 2:] = True
    y, stats = sublayer(x, mask)
    assert torch.equal(y[mask], x[mask])
    assert not stats.passes[mask].any() and stats.passes[~mask].all()
    alone, without = sublayer(x[:, :2])
    torch.testing.assert_close(y[:, :2], alone)
    assert stats.gates[0].num_tokens == without.gates[0].num_tokens == 3 * 2 * 2
    assert not stats.gates[0].kept_C.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    sublayer = make((2, 2), head_dim=8, dtype=torch.float)
    x = torch.randn(9, 16)
    expected, full = sublayer.eval()(x)
    y, stats = sublayer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and stats.gates[0].scores_TE.dtype == torch.float32
    same = (stats.passes == full.passes).all(1)  # rounding may send a head another way
    assert same.sum() >= 6
    torch.testing.assert_close(y[same].float(), expected[same], rtol=0.1, atol=0.1)


def test_recomputed_activations_give_the_same_gradients():
    sublayer = make((2, 2)).train()
    x = torch.randn(9, 6, dtype=torch.double, requires_grad=True)
    tensors = [x, *sublayer.parameters()]

    def run(x):
        y, stats = sublayer(x)
        return y.sin().sum() + stats.balance_loss

    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for one, other in zip(gradients(run(x), tensors), gradients(again, tensors)):
        assert torch.equal(one, other)


def test_the_masked_path_of_grouped_mm():
    kinds = [
        make((2, 2), 2, 8, dtype=torch.float, expert_backend=b) for b in ("loop", "grouped_mm")
    ]
    x, mask = torch.randn(9, 16), torch.arange(9) >= 7
    (loop, loops), (grouped, masked) = [sublayer.eval()(x, mask) for sublayer in kinds]
    torch.testing.assert_close(loop, grouped, rtol=1e-5, atol=1e-5)
    assert loops.gates[1].here_T is None and masked.gates[1].here_T is not None
    assert torch.equal(loops.passes, masked.passes)


def test_how_the_projections_start():
    sublayer = build(64, moe_heads=4)
    bound = (6 / 128) ** 0.5
    for linear, gain in ((sublayer.head, 0.5**0.5), (sublayer.merge, 1)):
        assert 0.97 * gain * bound < linear.weight.abs().max() <= gain * bound
    assert not sublayer.merge.bias.any()


# --------------------------------------------------------------------------------------
# options


def test_by_name_and_by_flag():
    by_name, by_flag = build(moe_arrangement="multi-head"), build(moe_heads=4)
    assert str(by_name) == str(by_flag)
    assert by_name.heads == 4 and by_name.block.experts.embed_dim == 2
    assert num_heads(model_options()) == 1


def test_width_of_the_experts():
    sublayer = build(moe_heads=2, moe_cmr=True, moe_ffn_dim=12)
    assert sublayer.block.block.experts.fc1_weight.shape == (4, 4, 12)
    assert sublayer.block.fc1.weight.shape == (5, 4)  # the dense FFN keeps its own
    assert build(moe_ffn_dim=12).experts.ffn_dim == 12


@pytest.mark.parametrize("residual", ["paper", "released"])
def test_it_holds_the_other_arrangements(residual):
    options = dict(moe_heads=2, moe_cmr=True, smoe_stacking=True, moe_head_residual=residual)
    sublayer = build(**options)
    kinds = [MultiHeadBlock, CMRBlock, StackedMoEBlock]
    assert [type(m) for m in (sublayer, sublayer.block, sublayer.block.block)] == kinds
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, True, True]])
    y, stats = sublayer(x, mask)
    assert torch.equal(y[mask], x[mask])
    assert stats.passes.shape == (2, 3, 2) and stats.passes.unique().tolist() == [0, 2]
    assert stats.shared_weight.shape == (4 * 2,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_heads": 0}, "--moe-heads 0: expected 1 or more"),
        ({"moe_head_residual": "eq6"}, "--moe-head-residual eq6: expected paper or released"),
        (
            {"moe_heads": 2, "moe_head_residual": "released", "smoe_norm": "released"},
            "--moe-head-residual released with --smoe-norm released",
        ),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(OptionError, match=message):
        doors.check_kinds(model_options(**changes), (2, 2))


def test_heads_that_do_not_divide_the_dim():
    with pytest.raises(OptionError, match="--moe-heads 3: expected a divisor of the model dim, 8"):
        build(moe_heads=3)


# --------------------------------------------------------------------------------------
# experts that ranks share


def compare_ranks(rank):
    for size, strata in ((2, (2, 2)), (4, (4,)), (4, (2, 2))):
        group = form_expert_group(size)
        ours, whole = (make(strata, expert_group=g) for g in (group, None))
        own = Namespace(**dict(ours.named_parameters()))
        x = torch.randn(5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(rank))
        with torch.no_grad():  # make() has drawn other numbers for a share of the experts
            for name, parameter in whole.named_parameters():
                value = parameter
                if name.startswith("block.experts."):
                    value = group.share(parameter)
                vars(own)[name].copy_(value)
        mask = torch.arange(5) >= 5 - rank
        y, stats = ours(x, mask)
        (y.sin().sum() + stats.balance_loss).backward()
        experts = {n: p for n, p in vars(own).items() if n.startswith("block.experts.")}
        group.average_gradients(experts.values())
        for other in range(dist.get_world_size()):
            generator = torch.Generator().manual_seed(other)
            their_x = torch.randn(5, 6, dtype=torch.double, generator=generator)
            their_y, their_stats = whole(their_x, torch.arange(5) >= 5 - other)
            (their_y.sin().sum() + their_stats.balance_loss).backward()
            if other == rank:
                torch.testing.assert_close(y, their_y, rtol=0, atol=1e-10)
        for name, parameter in whole.named_parameters():
            reference, gradient = parameter.grad / dist.get_world_size(), vars(own)[name].grad
            if name in experts:
                reference = group.share(reference)
            else:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-10, msg=name)


def test_ranks_that_share_experts_compute_what_one_computes():
    run_ranks(compare_ranks, 4)


# --------------------------------------------------------------------------------------
# counts: rows, not tokens, are what experts compute


@settings(deadline=None, max_examples=20)
@given(
    strata=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    heads=st.sampled_from([2, 4]),
)
def test_rows_of_heads(strata, heads):
    """As many as the heads visit, each of D / H numbers."""
    sublayer = make(strata, heads)
    rows = []
    multiply = sublayer.block.experts.multiply

    def counting(rows_ND, *args):
        rows.append(rows_ND.shape)
        return multiply(rows_ND, *args)

    sublayer.block.experts.multiply = counting
    _, stats = sublayer.eval()(torch.randn(5, 3 * heads, dtype=torch.double))
    at_gate = [len(gate.scores_TE) for gate in stats.gates]
    seen = map(len, visible_experts(strata))
    assert rows == [(tokens * min(2, e), 3) for tokens, e in zip(at_gate, seen)]
    assert at_gate[0] == 5 * heads and sum(at_gate) == stats.passes.sum()
