"""What users of ``SMoEBlock`` rely on beyond its agreement with the reference."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fairseq_smoe.moe.arrangements.cmr import CMRBlock
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock


def make_block(kind=SMoEBlock, seed=0, **options):
    torch.manual_seed(seed)
    return kind(8, 16, **{"strata": (2, 2, 4), **options})


def test_import_needs_no_fairseq():
    code = (
        "import sys; from fairseq_smoe import SMoEBlock; import fairseq_smoe.smoe_block as old, "
        "fairseq_smoe.moe.doors as doors; assert old.SMoEBlock is SMoEBlock; doors.all_kinds(); "
        "sys.exit('fairseq' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_parameter_names_and_shapes():
    shapes = {n: tuple(p.shape) for n, p in make_block(norm="released").state_dict().items()}
    norms = {f"norms.{i}.{p}": (8,) for i in range(4) for p in ("weight", "bias")}
    gates = {"gates.0.weight": (8, 8), "gates.1.weight": (6, 8), "gates.2.weight": (4, 8)}
    experts = {
        "experts.fc1_weight": (8, 8, 16),
        "experts.fc1_bias": (8, 16),
        "experts.fc2_weight": (8, 16, 8),
        "experts.fc2_bias": (8, 8),
    }
    assert shapes == {**norms, **gates, **experts}


def test_pass_scale_is_one_more_parameter():
    plain, scaled = make_block(), make_block(pass_scale=(1, 0.5, 0))
    assert dict(scaled.state_dict()).keys() - plain.state_dict().keys() == {"pass_scale"}
    assert scaled.pass_scale.tolist() == [1, 0.5, 0]
    x = torch.randn(30, 8)
    for norm in ("paper", "released"):
        plain, ones = make_block(norm=norm), make_block(norm=norm, pass_scale=(1, 1, 1))
        assert torch.equal(plain(x)[0], ones(x)[0])


def test_passes_with_scale_zero_change_nothing_but_learn():
    block = make_block(strata=(2, 2, 2), pass_scale=(0, 0, 0))
    x = torch.randn(60, 8)
    y, stats = block(x)
    assert torch.equal(y, x) and stats.passes.max() == 3
    y.square().sum().backward()
    assert block.pass_scale.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pass_scale_leaves_the_precision(dtype):
    block = make_block(pass_scale=(1, 0.5, 0)).train()
    x = torch.randn(40, 8)
    with torch.autocast("cpu", dtype=dtype):
        y, _ = block(x)
    torch.testing.assert_close(y, block(x)[0], rtol=0.05, atol=0.05)
    assert block.to(dtype)(x.to(dtype))[0].dtype == dtype


def test_pass_curriculum_opens_the_later_passes_step_by_step():
    block = make_block(pass_curriculum=200, capacity_factor=None).train()
    plain = make_block(capacity_factor=None).train()
    x = torch.randn(40_000, 8)

    def share_going_on(updates):
        block.set_num_updates(updates)
        first, *later = [int(gate.num_tokens) for gate in block(x)[1].gates]
        wanted, *more = [int(gate.num_tokens) for gate in plain(x)[1].gates]
        return first, later, wanted, more

    for updates, share in ((0, 0), (50, 0.25), (100, 0.5), (200, 1), (1000, 1)):
        first, later, wanted, more = share_going_on(updates)
        assert first == wanted == 40_000
        # to the second gate only from the first; to the third also from the second
        assert later[0] == pytest.approx(share * more[0], rel=0.1)
        assert (share in (0, 1)) == (later in ([0, 0], more))
    assert torch.equal(block(x)[0], plain(x)[0])


def test_pass_curriculum_leaves_every_gradient_and_evaluation():
    block = make_block(pass_curriculum=200).train()
    block(torch.randn(50, 8))[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    x, plain = torch.randn(50, 8), make_block()
    assert torch.equal(block.eval()(x)[0], plain.eval()(x)[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"pass_curriculum": -1},
        {"pass_scale": (1, 0)},
        {"strata": ()},
        {"strata": (4, 0)},
        {"top_k": 3},
        {"norm": "batch"},
        {"second_expert_policy": "random"},
        {"eom": 1.0},
    ],
)
def test_wrong_options_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        make_block(**wrong)


def dense_ffn(block, expert, x):
    """The block's expert ``expert`` applied to ``x``, as a dense FFN."""
    e = block.experts
    hidden = F.relu(x @ e.fc1_weight[expert] + e.fc1_bias[expert])
    return hidden @ e.fc2_weight[expert] + e.fc2_bias[expert]


def test_one_stratum_is_the_vanilla_moe():
    """x + sum of the top two experts of LN(x), weighted by their renormalised probabilities."""
    block = make_block(strata=(6,)).eval()
    x = torch.randn(5, 7, 8)
    h = block.norms[0](x)
    probs, experts = (h @ block.gates[0].weight.t()).softmax(-1).topk(2)
    outputs = torch.stack([dense_ffn(block, e, h) for e in range(6)], dim=-2)
    chosen = outputs.gather(-2, experts.unsqueeze(-1).expand(-1, -1, -1, 8))
    weights = (probs / probs.sum(-1, keepdim=True)).unsqueeze(-1)
    y, stats = block(x)
    torch.testing.assert_close(y, x + (weights * chosen).sum(-2))
    assert (stats.passes == 1).all()


def test_one_stratum_and_one_choice_is_switch():
    """x + p * FFN_e(LN(x)) for the most probable expert e, at its bare probability p."""
    block = make_block(strata=(6,), top_k=1).eval()
    x = torch.randn(5, 7, 8)
    h = block.norms[0](x)
    prob, expert = (h @ block.gates[0].weight.t()).softmax(-1).max(-1)
    outputs = torch.stack([dense_ffn(block, e, h) for e in range(6)], dim=-2)
    chosen = outputs.gather(-2, expert[..., None, None].expand(-1, -1, 1, 8)).squeeze(-2)
    torch.testing.assert_close(block(x)[0], x + prob.unsqueeze(-1) * chosen)


def test_stacking_is_moe_layers_in_a_row():
    stacked = make_block(StackedMoEBlock, strata=(3, 5)).eval()
    x = torch.randn(11, 8)
    y = stacked.norms[0](x)
    for i, experts in enumerate((range(3), range(3, 8))):
        layer = make_block(strata=(len(experts),)).eval()
        with torch.no_grad():
            layer.norms[0] = torch.nn.Identity()
            layer.gates[0].weight.copy_(stacked.gates[i].weight)
            for name, parameter in layer.experts.named_parameters():
                parameter.copy_(getattr(stacked.experts, name)[experts.start : experts.stop])
        y = layer(y)[0] - y  # without the residual
    actual, stats = stacked(x)
    torch.testing.assert_close(actual, x + y)
    assert (stats.passes == 2).all()
    assert [len(gate.scores_TE[0]) for gate in stats.gates] == [3, 5]


def test_cmr_mixes_a_dense_ffn_with_the_experts():
    block = make_block(strata=(2, 2))
    cmr = CMRBlock(block, 8, 16, gate_drop=0.5).eval()
    x = torch.randn(4, 5, 8)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = True
    h = block.norms[0](x)
    gate = torch.sigmoid(cmr.cmr_gate(h))
    dense = x + cmr.fc2(F.relu(cmr.fc1(h)))
    expected = gate * block(x, mask)[0] + (1 - gate) * dense
    y, stats = cmr(x, mask)
    torch.testing.assert_close(y[~mask], expected[~mask])
    assert torch.equal(y[mask], x[mask])
    torch.testing.assert_close(stats.shared_weight, gate.squeeze(-1)[~mask])

    cmr.train()
    x = torch.randn(40_000, 8)
    bypassed = (cmr(x)[0] - (x + cmr.fc2(F.relu(cmr.fc1(block.norms[0](x)))))).abs().sum(1) < 1e-6
    assert 0.45 < bypassed.float().mean() < 0.55


@pytest.mark.parametrize("kind", [SMoEBlock, StackedMoEBlock])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"eom": 0.3}, {"second_expert_policy": "sampling"}]
)
def test_evaluation_of_a_token_does_not_depend_on_the_others(kind, options):
    block = make_block(kind, **options).double().eval()
    x = torch.randn(6, 9, 8, dtype=torch.double)
    mask = torch.rand(6, 9) < 0.3
    together = block(x, mask)[0]
    alone = torch.stack(
        [torch.stack([block(x[b, s : s + 1])[0][0] for s in range(9)]) for b in range(6)]
    )
    torch.testing.assert_close(together[~mask], alone[~mask])
    assert torch.equal(together[mask], x[mask])
    shuffled = torch.randperm(6)
    torch.testing.assert_close(block(x[shuffled], mask[shuffled])[0], together[shuffled])
    assert torch.equal(block(x, mask)[0], together)


def test_padding_changes_nothing_in_training():
    """It is not routed, takes no capacity and does not enter the loss."""
    x = torch.randn(30, 8)
    mask = torch.rand(30) < 0.4
    padded, compact = (make_block(capacity_factor=0.5).train() for _ in range(2))
    y, stats = padded(x, mask)
    expected, expected_stats = compact(x[~mask])
    assert torch.equal(y[~mask], expected)
    assert torch.equal(y[mask], x[mask])
    assert torch.equal(stats.balance_loss, expected_stats.balance_loss)
    assert torch.equal(stats.passes[~mask], expected_stats.passes)
    assert not stats.passes[mask].any()


def test_eom_masks_expert_outputs():
    block = make_block(strata=(4,), eom=0.25, capacity_factor=None).train()
    plain = make_block(strata=(4,)).eval()
    x = torch.randn(40_000, 8)
    with torch.no_grad():
        update, full = block(x)[0] - x, plain(x)[0] - x
        # a token keeps both outputs with probability 0.75 squared, none with 0.25 squared
        assert abs((update - full).abs().amax(1).lt(1e-6).float().mean() - 0.5625) < 0.03
        assert abs(update.abs().amax(1).lt(1e-6).float().mean() - 0.0625) < 0.02
        torch.testing.assert_close(block.eval()(x)[0] - x, 0.75 * full)


def test_sampling_draws_the_second_expert_from_the_gate():
    block = make_block(strata=(4,), second_expert_policy="sampling", capacity_factor=None).train()
    x = torch.randn(1, 8).expand(20000, 8)
    stats = block(x)[1]
    probs = stats.gates[0].scores_TE[0]
    first, second = stats.gates[0].expert_C.view(2, -1)
    assert (first == probs.argmax()).all()
    expected = probs.clone()
    expected[probs.argmax()] = 0
    observed = torch.bincount(second, minlength=4) / len(x)
    torch.testing.assert_close(observed, expected / expected.sum(), rtol=0, atol=0.02)
    deterministic = block.eval()(x)[1].gates[0].expert_C.view(2, -1)[1]
    assert (deterministic == probs.topk(2).indices[1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gate_does_not_overflow_in_half_precision(dtype):
    block = make_block().to(dtype).train()
    with torch.no_grad():
        for gate in block.gates:
            gate.weight.fill_(3e4).mul_(torch.randn_like(gate.weight).sign())
    y, stats = block(torch.randn(50, 8).to(dtype))
    stats.balance_loss.backward()
    assert y.dtype == dtype and y.isfinite().all()
    assert all(gate.scores_TE.dtype == torch.float32 for gate in stats.gates)
    assert all(gate.scores_TE.isfinite().all() for gate in stats.gates)
    assert all(gate.weight.grad.isfinite().all() for gate in block.gates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_gate_in_float32(dtype):
    block = make_block(norm="released").train()
    x = torch.randn(40, 8)
    with torch.autocast("cpu", dtype=dtype):
        y, stats = block(x)
    torch.testing.assert_close(y, block(x)[0], rtol=0.05, atol=0.05)
    assert all(gate.scores_TE.dtype == torch.float32 for gate in stats.gates)


def test_dropout_applies_to_every_pass_and_only_in_training():
    x = torch.randn(64, 8)
    block = make_block(dropout=0.5, activation_dropout=0.5)
    same = make_block()
    assert torch.equal(block.eval()(x)[0], same.eval()(x)[0])
    assert not torch.allclose(block.train()(x)[0], same.train()(x)[0])
