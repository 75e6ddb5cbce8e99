"""Experts whose weights are products of tensors (MPOE)."""

import copy
import math
from functools import partial

import pytest
import systems_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_doors import build, model_options
from test_expert_group import compare, tokens_of
from test_expert_group import make_block as make_shared_block
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.doors import check_kinds
from fairseq_smoe.moe.expert_group import form_expert_group
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts
from fairseq_smoe.moe.expert_kinds.tensor_product import TensorProductExperts, TensorProductOptions
from fairseq_smoe.moe.matrix_product import (
    balanced_shape,
    decompose,
    rebuild,
    rebuild_flops,
    tensor_shapes,
)

IN, OUT = "1,2,3,1,2", "2,1,2,2,1"  # of 12 and 8
FACTORS = {"mpo_in_shape": IN, "mpo_out_shape": OUT}


def make_experts(**options):
    return partial(TensorProductExperts, options=TensorProductOptions(**options))


def make_block(strata=(2, 3), top_k=2, seed=0, dims=(12, 8), dtype=torch.float64, **options):
    torch.manual_seed(seed)
    block = SMoEBlock(*dims, strata, top_k, make_experts=make_experts(**options))
    return block.to(dtype)


# --------------------------------------------------------------------------------------
# the matrices


def shapes(length):
    return st.lists(st.integers(1, 3), min_size=length, max_size=length).map(tuple)


@settings(deadline=None, max_examples=30)
@given(pair=st.sampled_from([3, 5]).flatmap(lambda n: st.tuples(shapes(n), shapes(n))))
def test_a_matrix_from_its_tensors(pair):
    torch.manual_seed(0)
    matrix = torch.randn(*map(math.prod, pair), dtype=torch.float64)
    tensors = decompose(matrix, *pair)
    assert [tuple(tensor.shape) for tensor in tensors] == tensor_shapes(*pair)
    torch.testing.assert_close(rebuild(tensors), matrix, rtol=0, atol=1e-12)
    in_single = rebuild(decompose(matrix.float(), *pair))
    torch.testing.assert_close(in_single, matrix.float(), rtol=0, atol=1e-4)
    errors = []
    full = max(shape[0] for shape in tensor_shapes(*pair))
    for bond in sorted({1, 2, 3, full // 3 + 1, full - 1, full} & set(range(1, full + 1))):
        limited = decompose(matrix, *pair, bond)
        assert [tuple(tensor.shape) for tensor in limited] == tensor_shapes(*pair, bond)
        errors.append((rebuild(limited) - matrix).norm())
    assert all(more <= less + 1e-12 for less, more in zip(errors, errors[1:]))
    assert not errors or errors[-1] < 1e-12 * matrix.numel()


def test_tensors_but_the_central_one_keep_norms():
    matrix = torch.randn(12, 8, dtype=torch.float64)
    first, second, central, fourth, fifth = decompose(matrix, (1, 2, 3, 1, 2), (2, 1, 2, 2, 1))
    for tensor in (first, second):
        flat = tensor.flatten(0, 2)
        torch.testing.assert_close(flat.t() @ flat, torch.eye(flat.shape[1], dtype=flat.dtype))
    for tensor in (fourth, fifth):
        flat = tensor.flatten(1)
        torch.testing.assert_close(flat @ flat.t(), torch.eye(len(flat), dtype=flat.dtype))
    torch.testing.assert_close(central.norm(), matrix.norm())


@given(width=st.integers(1, 5000), length=st.sampled_from([3, 5, 7]))
def test_default_shapes_multiply_to_the_width(width, length):
    shape = balanced_shape(width, length)
    assert len(shape) == length and math.prod(shape) == width
    assert shape[length // 2] == max(shape)


@pytest.mark.parametrize(
    "width, shape",
    [
        (768, (3, 4, 4, 4, 4)),
        (3072, (4, 4, 8, 6, 4)),
        (1024, (4, 4, 4, 4, 4)),
        (4096, (4, 4, 8, 8, 4)),
        (512, (2, 4, 4, 4, 4)),
        (2048, (4, 4, 8, 4, 4)),
    ],
)
def test_default_shapes_are_those_of_the_authors(width, shape):
    assert balanced_shape(width) == shape


def test_sizes_of_the_paper():
    """At full bond the central tensor is as large as the matrix, the others are 7.8% of it."""
    for width, out_width in ((768, 3072), (512, 2048)):
        numbers = [
            math.prod(shape)
            for shape in tensor_shapes(balanced_shape(width), balanced_shape(out_width))
        ]
        assert numbers.pop(2) == width * out_width
        assert sum(numbers) / (width * out_width) == pytest.approx(0.078, abs=5e-4)


@settings(deadline=None, max_examples=40)
@given(
    pair=st.sampled_from([3, 5, 7]).flatmap(lambda n: st.tuples(shapes(n), shapes(n))),
    bond=st.integers(0, 5),
    experts=st.integers(1, 3),
)
def test_flops_are_those_of_the_products(pair, bond, experts):
    shapes = tensor_shapes(*pair, bond)
    tensors = [torch.empty(experts, *shape, device="meta") for shape in shapes]
    tensors[len(tensors) // 2] = torch.empty(shapes[len(tensors) // 2], device="meta")
    with FlopCounterMode(display=False) as counter:
        matrices = rebuild(tensors)
    assert matrices.shape == (experts, *map(math.prod, pair))
    assert counter.get_total_flops() == experts * rebuild_flops(shapes)


# --------------------------------------------------------------------------------------
# the block


@settings(deadline=None, max_examples=40)
@given(
    strata=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    top_k=st.sampled_from([1, 2]),
    bond=st.sampled_from([0, 1, 3]),
    share=st.sampled_from(["block", "stratum"]),
    bias=st.sampled_from(["common", "own"]),
    tokens=st.integers(1, 7),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_block_is_that_of_the_equations(strata, top_k, bond, share, bias, tokens, padding, seed):
    options = FACTORS | {"mpo_bond": bond, "mpo_share": share, "mpo_bias": bias}
    block = make_block(strata, top_k, seed, **options)
    block.train()
    block.gates.eval()  # nothing is dropped
    for gate in block.gates:
        gate.capacity = lambda number: None
    x = torch.randn(tokens + padding, 12, dtype=torch.float64, requires_grad=True)
    y, stats = block(x, torch.arange(len(x)) >= tokens)
    apply = partial(reference.tensor_product, block.experts)
    expected = reference.run(block, x[:tokens], reference.choose_top_k(block, top_k), apply)
    assert torch.equal(y[tokens:], x[tokens:])
    torch.testing.assert_close(y[:tokens], expected.out, rtol=1e-9, atol=1e-9)
    assert stats.passes[:tokens].tolist() == expected.passes
    target = torch.randn_like(expected.out)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y[:tokens] * target).sum(), inputs, allow_unused=True),
        torch.autograd.grad((expected.out * target).sum(), inputs, allow_unused=True),
    ):
        assert ours is not None or theirs is None
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", ["common", "own"])
def test_full_bond_is_the_dense_expert(bias):
    fc1, fc2 = nn.Linear(12, 8).double(), nn.Linear(8, 12).double()
    block = make_block(mpo_bias=bias, **FACTORS)
    block.experts.copy_ffn(fc1, fc2, noise=0)
    dense = SMoEBlock(12, 8, (2, 3), make_experts=FFNExperts).double()
    dense.gates.load_state_dict(block.gates.state_dict())
    with torch.no_grad():
        for name, linear in (("fc1", fc1), ("fc2", fc2)):
            getattr(dense.experts, f"{name}_weight")[:] = linear.weight.t()
            getattr(dense.experts, f"{name}_bias")[:] = linear.bias
    x = torch.randn(30, 12, dtype=torch.float64)
    torch.testing.assert_close(block.eval()(x)[0], dense.eval()(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", ["block", "stratum"])
@pytest.mark.parametrize("bond", [0, 4])
def test_experts_start_different_with_the_variance_of_a_linear_layer(share, bond):
    torch.manual_seed(0)
    experts = make_experts(mpo_share=share, mpo_bond=bond)((2, 2), 64, 128)
    for weight, width in zip(experts.weights(torch.float32)[::2], (64, 128)):
        assert (weight.var(dim=(1, 2)) * 3 * width - 1).abs().max() < 0.3
        correlation = torch.corrcoef(weight.flatten(1))
        assert (correlation - torch.eye(4)).abs().max() < 0.1


def test_experts_made_from_one_ffn_are_told_apart_by_noise():
    experts = make_experts()((4,), 64, 128)
    fc1, fc2 = nn.Linear(64, 128), nn.Linear(128, 64)
    experts.copy_ffn(fc1, fc2, noise=0.01)
    for weight, linear in zip(experts.weights(torch.float32)[::2], (fc1, fc2)):
        relative = (weight - linear.weight.t()).norm(dim=(1, 2)) / linear.weight.norm()
        assert 0.001 < relative.min() <= relative.max() < 0.1
        assert (weight[0] - weight[1]).norm() > 0.001 * weight[0].norm()


@pytest.mark.parametrize("share, number", [("block", 1), ("stratum", 2)])
def test_experts_have_their_central_tensors_in_common(share, number):
    experts = make_block((2, 3), mpo_share=share).experts
    assert len(experts.common.fc1_central) == len(experts.common.fc1_bias) == number
    own = sum(p.numel() for n, p in experts.named_parameters() if not n.startswith("common."))
    assert experts.num_parameters() == own
    before = [w.detach().clone() for w in experts.weights(torch.float64)[::2]]
    with torch.no_grad():
        for layer in ("fc1", "fc2"):
            getattr(experts.common, f"{layer}_central")[-1] *= 2
    for old, new in zip(before, experts.weights(torch.float64)[::2]):
        first = 0 if share == "block" else 2
        torch.testing.assert_close(new[first:], 2 * old[first:])
        torch.testing.assert_close(new[:first], old[:first])


@pytest.mark.parametrize("training", [True, False])
def test_the_device_is_never_waited_for(training):
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            options = {"moe_expert_backend": "grouped_mm", "mpo_share": "stratum"}
            make = make_experts(**options)
            block = SMoEBlock(16, 32, (2, 2), make_experts=make).train(training)
            x = torch.randn(9, 16, requires_grad=True)
            block(x, torch.zeros(9, dtype=torch.bool))[0].sum().backward()
            assert x.grad.shape == (9, 16)
    finally:
        torch.set_default_dtype(dtype)


def test_backends_agree():
    loop = make_block(dims=(16, 32), dtype=torch.float32, moe_expert_backend="loop")
    grouped = make_block(dims=(16, 32), dtype=torch.float32, moe_expert_backend="grouped_mm")
    x = torch.randn(20, 16)
    outputs = [block(x, torch.arange(20) > 16)[0] for block in (loop, grouped)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    for (name, p), q in zip(loop.named_parameters(), grouped.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


# --------------------------------------------------------------------------------------
# weights that evaluation keeps


@pytest.fixture
def rebuilt(monkeypatch):
    """Counts how often weights are rebuilt."""
    calls = []
    stock = TensorProductExperts._rebuild
    monkeypatch.setattr(
        TensorProductExperts, "_rebuild", lambda self, dtype: calls.append(1) or stock(self, dtype)
    )
    return calls


def test_weights_are_rebuilt_once_a_pass_and_once_in_evaluation(rebuilt):
    block = make_block((2, 2, 2))
    x = torch.randn(30, 12, dtype=torch.float64)
    block(x)[0].sum().backward()
    assert len(rebuilt) == 1
    block(x)
    assert len(rebuilt) == 2
    block.eval()
    with torch.no_grad():
        first = block(x)[0]
        assert torch.equal(block(x)[0], first) and len(rebuilt) == 3
    assert torch.equal(block(x)[0], first) and len(rebuilt) == 4  # with gradients


@pytest.mark.parametrize(
    "change",
    [
        lambda block, other: block.load_state_dict(other.state_dict()),
        lambda block, other: block.experts.common.fc1_central.mul_(2),
        lambda block, other: block.train().eval(),
        lambda block, other: block.float().double(),
    ],
)
def test_changed_tensors_are_rebuilt(change, rebuilt):
    block, other = make_block().eval(), make_block(seed=1)
    x = torch.randn(30, 12, dtype=torch.float64)
    with torch.no_grad():
        block(x)
        change(block, other)
        y = block(x)[0]
        assert len(rebuilt) == 2
        assert torch.equal(y, copy.deepcopy(block).train().eval()(x)[0])


# --------------------------------------------------------------------------------------
# processes, options


def test_biases_of_their_own_are_two_more_stacked_parameters():
    common, own = (make_block(mpo_bias=bias).experts for bias in ("common", "own"))
    named = [{name for name, _ in experts.named_parameters()} for experts in (common, own)]
    biases = {"fc1_bias", "fc2_bias"}
    assert named[0] ^ named[1] == biases | {f"common.{name}" for name in biases}
    assert own.num_parameters() - common.num_parameters() == 5 * (12 + 8)
    y, expected = own.weights(torch.float64), common.weights(torch.float64)
    assert [t.shape for t in y] == [t.shape for t in expected]


def compare_in_processes(rank, size):
    cases = (("block", (4, 4), "own"), ("stratum", (2, 1, 1), "common"))
    for share, strata, bias in (*cases, ("stratum", (2, 2), "own")):
        make = make_experts(mpo_share=share, mpo_bias=bias)
        compare(rank, size, strata=strata, make_experts=make)


def check_gathered(rank):
    """Ranks that do not keep step compute alone, and afterwards together again."""
    options = {"strata": (4, 4), "make_experts": make_experts()}
    block = make_shared_block(form_expert_group(2), **options).eval()
    whole = make_shared_block(None, **options).eval()
    x, padding = tokens_of(rank, torch.float64)
    with torch.no_grad():
        expected = whole(x, padding)[0]
        torch.testing.assert_close(block(x, padding)[0], expected)
        block.experts.gather()
        if rank == 0:
            torch.testing.assert_close(block(x, padding)[0], expected)
        block.experts.release()
        torch.testing.assert_close(block(x, padding)[0], expected)


def test_gathered_experts_compute_alone():
    run_ranks(check_gathered, 2)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_share_experts_compute_what_one_computes(size):
    """Also where a process has no expert of a stratum."""
    run_ranks(compare_in_processes, size, size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mpo_share": "layer"}, "--mpo-share layer: expected block or stratum"),
        ({"mpo_bond": -1}, "--mpo-bond -1: expected 0"),
        ({"mpo_bias": "none"}, "--mpo-bias none: expected common or own"),
        ({"mpo_central_mask_prob": 1.5}, "--mpo-central-mask-prob 1.5: expected a probability"),
        ({"mpo_in_shape": "2,x,3"}, "--mpo-in-shape 2,x,3: expected factors"),
        ({"mpo_in_shape": "2,3"}, "--mpo-in-shape 2,3: expected an odd number"),
        ({"mpo_in_shape": "1,2,3", "mpo_out_shape": "1,1,5,1,1"}, "as many factors in both"),
        ({"mpo_in_shape": "2,2,2"}, "multiplies to 8, but the width is 6; .* 1,3,2$"),
        ({"mpo_out_shape": "2,2,2"}, "--mpo-out-shape 2,2,2: multiplies to 8, but the width is 5"),
    ],
)
def test_wrong_options(options, message):
    options = {"moe_experts": "tensor-product", **options}
    with pytest.raises(OptionError, match=message):
        check_kinds(model_options(**options), (2, 2))
        build(**options)


@pytest.mark.parametrize(
    "options", [{"mpo_bond": 3}, {"mpo_in_shape": "2,3,1"}, {"mpo_central_mask_prob": 0.5}]
)
def test_options_of_other_experts(options):
    with pytest.raises(OptionError, match="--mpo-.*: needs --moe-experts tensor-product"):
        check_kinds(model_options(**options), (2, 2))


def test_by_name():
    block = build(moe_experts="tensor-product", mpo_share="stratum")
    assert isinstance(block.experts, TensorProductExperts)
    assert len(block.experts.common.fc1_central) == 2
