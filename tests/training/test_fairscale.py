"""A block of one stratum against fairscale's Top2Gate and MOELayer on the same weights.

The two coincide when the tokens divide evenly among the experts (fairscale demands it) and the
second expert is not drawn at random: with two experts it never is, with more, fairscale's noise is
switched off here.
"""

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.moe import MOELayer, Top2Gate, top2gate
from torch import nn

from fairseq_smoe.moe.block import SMoEBlock


@pytest.fixture
def single_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def as_fairscale(block, group):
    """fairscale's layer with the weights of ``block``."""
    num_experts, dim, hidden = block.experts.fc1_weight.shape
    experts = nn.ModuleList()
    for w1, b1, w2, b2 in zip(*block.experts.parameters()):
        expert = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        with torch.no_grad():
            for linear, weight, bias in ((expert[0], w1, b1), (expert[2], w2, b2)):
                linear.weight.copy_(weight.t())
                linear.bias.copy_(bias)
        experts.append(expert)
    gate = Top2Gate(dim, num_experts)
    with torch.no_grad():
        gate.wg.weight.copy_(block.gates[0].weight)
    return MOELayer(gate, experts, group=group)


@pytest.mark.parametrize("num_experts", [2, 4])
def test_vanilla_block_is_fairscales_moe_layer(num_experts, single_process_group, monkeypatch):
    monkeypatch.setattr(
        top2gate, "gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device)
    )
    torch.manual_seed(3)
    block = SMoEBlock(8, 16, (num_experts,)).train()
    with torch.no_grad():
        block.gates[0].weight.mul_(5)  # uneven load: with four experts the capacity binds
    theirs = as_fairscale(block, single_process_group)
    x = torch.randn(8, 5, 8)

    y, stats = block(x)
    expected = theirs(block.norms[0](x))
    assert stats.gates[0].kept_C.all() == (num_experts == 2)
    torch.testing.assert_close(y - x, expected)
    # fairscale takes the mean over experts where the paper takes E times the sum
    torch.testing.assert_close(stats.balance_loss, theirs.l_aux * num_experts**2)

    cotangent = torch.randn_like(x)
    (y * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(block.gates[0].weight.grad, theirs.gate.wg.weight.grad)
    for e, expert in enumerate(theirs.experts):
        torch.testing.assert_close(block.experts.fc1_weight.grad[e], expert[0].weight.grad.t())
        torch.testing.assert_close(block.experts.fc2_bias.grad[e], expert[2].bias.grad)
