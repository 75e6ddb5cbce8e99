"""The block against the token-by-token reference: outputs, passes, balance loss, all gradients."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_block

from fairseq_smoe.moe.block import SMoEBlock

# by precision; grouped_mm knows no float64, and rows of 16 bytes at least
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass
class Case:
    """One block on one input."""

    strata: tuple
    norm: str = "paper"
    top_k: int = 2
    training: bool = False
    capacity_factor: float | None = 2.0
    padding: tuple = (False,) * 6
    embed_dim: int = 4
    ffn_dim: int = 6
    seed: int = 0
    unpopular_expert: int | None = None
    backend: str = "loop"
    pass_scale: float | None = None


def compare(case):
    """Run block and reference; assert that all they compute agrees. Returns the block's stats."""
    torch.manual_seed(case.seed)
    dtype, unit = (torch.float32, 4) if case.backend == "grouped_mm" else (torch.float64, 1)
    block = SMoEBlock(
        case.embed_dim * unit,
        case.ffn_dim * unit,
        case.strata,
        case.top_k,
        case.capacity_factor,
        norm=case.norm,
        expert_backend=case.backend,
        pass_scale=None if case.pass_scale is None else (case.pass_scale,) * len(case.strata),
    ).to(dtype)
    block.train(case.training)
    with torch.no_grad():
        for parameter in block.parameters():  # also moves norms away from the identity
            parameter.add_(torch.randn_like(parameter) * 0.5)
        if case.unpopular_expert is not None:
            for gate, visible in zip(block.gates, block.visible):
                if case.unpopular_expert in visible:
                    # a logit that is negative whatever the token: the norms' bias feeds it
                    gate.weight[case.unpopular_expert - visible.start] = -100
            for norm in block.norms:
                norm.weight.mul_(0.01)
                norm.bias.fill_(1.0)
    x = torch.randn(len(case.padding), case.embed_dim * unit, dtype=dtype)
    cotangent = torch.randn_like(x)
    capacity_factor = case.capacity_factor if case.training else None

    def gradients(y, balance_loss, inputs):
        loss = (y * cotangent).sum() + balance_loss
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads)]

    block_x = x.clone().requires_grad_()
    y, stats = block(block_x, torch.tensor(case.padding))
    names, parameters = zip(*block.named_parameters())
    grads = gradients(y, stats.balance_loss, [block_x, *parameters])

    copies = {n: p.detach().clone().requires_grad_() for n, p in zip(names, parameters)}
    reference_x = x.clone().requires_grad_()
    expected = reference_block(
        copies,
        case.strata,
        reference_x,
        top_k=case.top_k,
        capacity_factor=capacity_factor,
        norm=case.norm,
        padding=case.padding,
    )
    expected_grads = gradients(
        expected.y, expected.balance_loss, [reference_x, *(copies[n] for n in names)]
    )

    def close(actual, wanted, what, tolerance=TOLERANCE[dtype]):
        torch.testing.assert_close(
            actual, wanted, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}"
        )

    assert stats.passes.tolist() == expected.passes
    close(y, expected.y, "output")
    close(stats.balance_loss, expected.balance_loss, "balance loss")
    for name, actual, wanted in zip(["x", *names], grads, expected_grads):
        # sums over all tokens
        close(actual, wanted, f"gradient of {name}", 10 * TOLERANCE[dtype])
    return stats


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_agrees_with_the_reference(data):
    strata = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    compare(
        Case(
            strata=strata,
            norm=data.draw(st.sampled_from(["paper", "released"])),
            top_k=data.draw(st.sampled_from([1, 2])),
            training=data.draw(st.booleans()),
            capacity_factor=data.draw(st.sampled_from([0.5, 1.0, 2.0, None])),
            padding=tuple(data.draw(st.lists(st.booleans(), min_size=1, max_size=14))),
            embed_dim=data.draw(st.integers(2, 6)),
            ffn_dim=data.draw(st.integers(1, 6)),
            seed=data.draw(st.integers(0, 2**16)),
            unpopular_expert=data.draw(st.none() | st.integers(0, sum(strata) - 1)),
            backend=data.draw(st.sampled_from(["loop", "grouped_mm"])),
            pass_scale=data.draw(st.sampled_from([None, 0.0, 1.0])),
        )
    )


@pytest.mark.parametrize("norm", ["paper", "released"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
class TestCorners:
    def test_one_token(self, norm, training, top_k):
        compare(Case((2, 2), norm, top_k, training, padding=(False,)))

    def test_only_padding(self, norm, training, top_k):
        stats = compare(Case((2, 2), norm, top_k, training, padding=(True, True, True)))
        assert stats.passes.tolist() == [0, 0, 0]
        assert stats.balance_loss == 0

    def test_as_many_strata_as_experts(self, norm, training, top_k):
        compare(Case((1, 1, 1, 1), norm, top_k, training, padding=(False,) * 12))

    def test_an_expert_that_nobody_chooses(self, norm, training, top_k):
        case = Case((3, 3), norm, top_k, training, padding=(False,) * 12, unpopular_expert=1)
        stats = compare(case)
        assert 1 not in stats.gates[0].expert_C

    def test_binding_capacity(self, norm, training, top_k):
        case = Case((2, 2), norm, top_k, True, capacity_factor=0.5, padding=(False,) * 16)
        stats = compare(case)
        assert not stats.gates[0].kept_C.all()


def test_the_reference_sees_a_wrong_residual():
    """The comparison can fail: the two norm variants differ."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.double)
    block = SMoEBlock(4, 6, (2, 2)).double().eval()
    state = dict(block.named_parameters())
    state |= {"norms.2.weight": torch.ones(4).double(), "norms.2.bias": torch.zeros(4).double()}
    y, stats = block(x)
    released = reference_block(state, (2, 2), x, norm="released")
    assert stats.passes.max() == 2
    assert not torch.allclose(y, released.y, atol=1e-3)
