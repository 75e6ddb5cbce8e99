"""The backends of the experts against each other, and what they promise besides results."""

import copy
import gc

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.checkpoint import checkpoint

from fairseq_smoe.moe.arrangements.cmr import CMRBlock
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.grouped_linear import has_kernel
from fairseq_smoe.moe.shared_weight import SharedWeight, _Gradients
from fairseq_smoe.translation.routing_metrics import routing_metrics

BLOCKS = {
    "smoe": lambda **options: SMoEBlock(16, 32, (2, 2, 4), **options),
    "switch": lambda **options: SMoEBlock(16, 32, (8,), top_k=1, **options),
    "released": lambda **options: SMoEBlock(16, 32, (4, 4), norm="released", **options),
    "stacking": lambda **options: StackedMoEBlock(16, 32, (4, 4), **options),
    "cmr": lambda **options: CMRBlock(SMoEBlock(16, 32, (4, 4), **options), 16, 32),
}


def pair(kind, **options):
    """The same block with both backends: loop, grouped_mm."""
    torch.manual_seed(0)
    blocks = [BLOCKS[kind](expert_backend=name, **options) for name in ("loop", "grouped_mm")]
    blocks[1].load_state_dict(blocks[0].state_dict())
    return blocks


def run(block, x, mask, autocast=False):
    """Outputs, routing numbers and all gradients of a training step."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    with torch.autocast("cpu", enabled=autocast):
        y, stats = block(x, mask)
    (y.float().square().sum() + stats.balance_loss).backward()
    numbers = {"y": y.detach(), "passes": stats.passes, "balance": stats.balance_loss.detach()}
    numbers |= {k: torch.as_tensor(v) for k, v in routing_metrics({"encoder": stats}).items()}
    return numbers | {"x": x.grad} | {n: p.grad for n, p in block.named_parameters()}


@pytest.mark.parametrize("capacity_factor", [0.5, 2.0, None])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_results_do_not_depend_on_the_backend(kind, padded, capacity_factor):
    x = torch.randn(4, 9, 16)
    mask = torch.rand(4, 9) < 0.3 if padded else None
    loop, grouped = (run(block, x, mask) for block in pair(kind, capacity_factor=capacity_factor))
    assert loop.keys() == grouped.keys()
    for name, expected in loop.items():
        torch.testing.assert_close(grouped[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_autocast_multiplies_in_half_precision(backend):
    torch.manual_seed(0)
    block = SMoEBlock(16, 32, (4,), expert_backend=backend)  # no rounded token at a second gate
    x = torch.randn(30, 16)
    full, half = run(block, x, None), run(block, x, None, autocast=True)
    assert half["experts.fc1_weight"].dtype == torch.float32
    error = (half["experts.fc1_weight"] - full["experts.fc1_weight"]).abs().max()
    assert 0 < error < 0.1 * full["experts.fc1_weight"].abs().max()


def relu_squared(x):
    return torch.relu(x).pow(2)  # autocast computes it in float32


@pytest.mark.parametrize("activation", [torch.nn.functional.gelu, torch.tanh, relu_squared])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_activations_give_the_same_on_both_backends(activation, autocast):
    x = torch.randn(30, 16)
    blocks = pair("switch", activation_fn=activation)
    loop, grouped = (run(block, x, None, autocast) for block in blocks)
    accuracy = {"rtol": 0.02, "atol": 0.1} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for name, expected in loop.items():
        torch.testing.assert_close(grouped[name], expected, msg=name, **accuracy)


@pytest.mark.parametrize("activation", [torch.nn.functional.relu, torch.nn.functional.gelu])
@pytest.mark.parametrize("activation_dropout", [0, 0.4])
def test_gradients_are_those_of_what_is_computed(activation, activation_dropout):
    torch.manual_seed(0)
    dropout = {"activation_dropout": activation_dropout}
    block = SMoEBlock(4, 8, (3,), activation_fn=activation, **dropout).double()

    def output(x, *parameters):
        torch.manual_seed(3)  # the same units are dropped
        names = [name for name, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, parameters)), x)[0]

    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
class TestGradients:
    def test_are_added_over_several_backward_passes(self, backend):
        torch.manual_seed(0)
        block = SMoEBlock(16, 32, (2, 2), expert_backend=backend)
        y, stats = block(torch.randn(20, 16))
        loss = y.square().sum() + stats.balance_loss
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in block.parameters()]
        loss.backward()
        for parameter, grad in zip(block.parameters(), once):
            torch.testing.assert_close(parameter.grad, 2 * grad)

    def test_of_experts_without_tokens_are_zero(self, backend):
        torch.manual_seed(0)
        block = SMoEBlock(16, 32, (64,), expert_backend=backend)
        grad = run(block, torch.randn(3, 16), None)["experts.fc1_weight"]
        busy = grad.flatten(1).any(dim=1)
        assert 3 <= busy.sum() <= 6 and torch.isfinite(grad).all()

    def test_are_zero_where_all_is_padding(self, backend):
        block = SMoEBlock(16, 32, (2, 2), expert_backend=backend)
        numbers = run(block, torch.randn(3, 16), torch.ones(3, dtype=torch.bool))
        assert all(not numbers[name].any() for name, _ in block.named_parameters())

    def test_are_the_same_with_recomputation(self, backend):
        torch.manual_seed(0)
        block = SMoEBlock(16, 32, (2, 2), expert_backend=backend, capacity_factor=None)
        plain = run(block, x := torch.randn(20, 16), None)
        recomputing = copy.copy(block)
        recomputing.forward = lambda *args: checkpoint(block.forward, *args, use_reentrant=False)
        for name, grad in run(recomputing, x, None).items():
            torch.testing.assert_close(grad, plain[name], msg=name)


def weights_alive():
    """Identities of what passes share, wherever it is still referred to."""
    return {id(each) for each in gc.get_objects() if type(each) in (SharedWeight, _Gradients)}


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_of_a_step_stays_behind(backend, backward):
    block = SMoEBlock(16, 32, (2, 2), expert_backend=backend)
    gc.collect()
    before = weights_alive()  # those of other tests' models
    gc.disable()  # a circle of references would be found sooner or later, but not by autograd
    try:
        y, stats = block(torch.randn(20, 16))
        if backward:
            y.sum().backward()
        del y, stats
        assert weights_alive() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "cmr"])
def test_grouped_mm_never_waits_for_the_device(kind, training):
    """Tensors without data stop at whatever would have to read it."""

    def step(backend):
        x = torch.randn(5, 7, 16, requires_grad=True)
        block = BLOCKS[kind](expert_backend=backend, second_expert_policy="sampling")
        for mask in (None, torch.zeros(5, 7, dtype=torch.bool)):
            y, stats = block.train(training)(x, mask)
            (y.float().sum() + stats.balance_loss).backward()
            routing_metrics({"encoder": stats})
        return x.grad.shape

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            assert step("grouped_mm") == (5, 7, 16)
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                step("loop")
    finally:
        torch.set_default_dtype(dtype)


def test_a_type_that_grouped_mm_does_not_take_is_refused():
    block = SMoEBlock(16, 32, (2, 2), expert_backend="grouped_mm").double()
    with pytest.raises(ValueError, match="backend='grouped_mm': .*float64"):
        block(torch.randn(3, 16, dtype=torch.double))


@pytest.mark.parametrize(
    "dtype, capability, has",
    [
        (torch.bfloat16, (8, 0), False),  # A100
        (torch.bfloat16, (8, 9), False),  # L40
        (torch.bfloat16, (9, 0), True),  # H100
        (torch.bfloat16, (10, 0), True),  # B200
        (torch.bfloat16, (12, 0), False),  # RTX 50
        (torch.float16, (9, 0), False),
        (torch.float32, (9, 0), False),
    ],
)
def test_gpus_with_a_kernel_for_groups(dtype, capability, has):
    assert has_kernel(dtype, capability) == has
