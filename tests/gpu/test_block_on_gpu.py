"""The block on a GPU: against float64, without waiting for it, with recomputation."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_smoe.diagnosis.block_check import BlockCheck, step
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.grouped_linear import grouped_mm_is_fast
from fairseq_smoe.translation.routing_metrics import routing_metrics

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_ON_CPU = 1000  # where torch sums the gradients of half-precision norms in half precision


@pytest.mark.parametrize("strata", [(8,), (4, 4), (2, 3, 4), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("precision", DTYPES)
def test_float64_gives_the_same(device, precision, backend, strata):
    options = {"device": device, "dtype": DTYPES[precision], "backend": backend}
    for tokens in (1, 7, 300, 20_000 if device == "cuda" else MOST_ON_CPU):
        for padding in (0, 50):
            check = BlockCheck(strata, tokens, padding=padding, **options)
            assert check.failures() == {}, (tokens, padding)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.0])
def test_full_experts_drop_the_same_tokens(device, backend, capacity_factor):
    options = {"device": device, "dtype": torch.float32, "backend": backend}
    check = BlockCheck((2, 2, 2, 2), 500, padding=9, capacity_factor=capacity_factor, **options)
    assert check.failures() == {}


def test_all_padding(device):
    block = SMoEBlock(64, 128, (2, 2)).to(device)
    mask = torch.ones(20, dtype=torch.bool, device=device)
    found = step(block, torch.randn(20, 64, device=device), mask)
    assert not any(found[name].any() for name in found if name.startswith("gradient of experts"))


@pytest.mark.parametrize("strata", [(8,), (2, 2, 2, 2)], ids=str)
def test_the_host_never_waits_with_grouped_mm(device, strata):
    options = {"expert_backend": "grouped_mm", "second_expert_policy": "sampling"}
    block = SMoEBlock(64, 128, strata, **options).to(device, torch.bfloat16)
    if device == "cuda" and not grouped_mm_is_fast(block.experts.fc1_weight):
        pytest.skip("torch has no kernel for grouped_mm on this GPU")
    x = torch.randn(500, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.arange(500, device=device) > 480
    weight = torch.ones((), device=device)

    def one_step():
        y, stats = block(x, mask)
        (y.float().square().sum() + weight * stats.balance_loss).backward()
        return routing_metrics({"encoder": stats})

    one_step()  # libraries may wait when they are loaded
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = one_step()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert float(metrics["encoder_routed"]) == 481


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("precision", DTYPES)
def test_recomputation_gives_the_same(device, precision, backend):
    torch.manual_seed(1)
    block = SMoEBlock(64, 128, (2, 2), expert_backend=backend, dropout=0.1, activation_dropout=0.1)
    block = block.to(device, DTYPES[precision])
    x, mask = torch.randn(90, 64), torch.arange(90) > 80
    x, mask = x.to(device, DTYPES[precision]), mask.to(device)

    def found(run):
        torch.manual_seed(2)  # the same units are dropped
        block.zero_grad(set_to_none=True)
        return step(run, x, mask)

    recomputed = copy.copy(block)
    recomputed.forward = lambda *args: checkpoint(block.forward, *args, use_reentrant=False)
    plain, again = found(block), found(recomputed)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        # a GPU adds up in another order each time
        close = (
            {"rtol": 2e-2, "atol": 1e-2} if precision != "fp32" else {"rtol": 1e-5, "atol": 1e-5}
        )
        torch.testing.assert_close(again[name], value, msg=name, **close)
