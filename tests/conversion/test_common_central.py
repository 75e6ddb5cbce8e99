"""Matrices that have the central tensor of their chains in common."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairseq_smoe.conversion.common_central import factorise_together
from fairseq_smoe.moe.matrix_product import decompose, rebuild, tensor_shapes

SHAPES = (2, 2, 4, 2, 2), (2, 2, 4, 4, 2)  # of 64 and 128


def shapes(length):
    return st.lists(st.integers(1, 3), min_size=length, max_size=length).map(tuple)


def relative(approximations, matrices):
    missed = (approximations - matrices.double()).norm(dim=(1, 2))
    return missed / matrices.double().norm(dim=(1, 2))


@example(pair=((1,) * 5, (1, 1, 1, 1, 2)), bond=0, experts=2, sweeps=0, same=False, seed=0)
@settings(deadline=None, max_examples=40)
@given(
    pair=st.sampled_from([3, 5, 7]).flatmap(lambda n: st.tuples(shapes(n), shapes(n))),
    bond=st.sampled_from([0, 0, 1, 2, 5]),
    experts=st.integers(1, 3),
    sweeps=st.sampled_from([0, 3]),
    same=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_shapes_errors_and_exactness(pair, bond, experts, sweeps, same, seed):
    """The shapes are those of the experts' parameters, the errors those of the rebuilt matrices.
    Equal matrices with full bonds are exact; without sweeps, all become their mean, if each has
    all of its space: a bond may also be limited by what is on its other side."""
    torch.manual_seed(seed)
    size = tuple(map(math.prod, pair))
    matrices = torch.randn(1 if same else experts, *size, dtype=torch.float64)
    matrices = matrices.expand(experts, *size)
    tensors, errors = factorise_together(matrices, *pair, bond, sweeps)
    middle = len(tensors) // 2
    for k, (tensor, shape) in enumerate(zip(tensors, tensor_shapes(*pair, bond), strict=True)):
        assert tensor.shape == (shape if k == middle else (experts, *shape))
    rebuilt = rebuild(tensors)
    torch.testing.assert_close(
        torch.tensor(errors, dtype=torch.float64),
        relative(rebuilt, matrices),
        rtol=1e-6,
        atol=1e-12,
    )
    if same and not bond:
        torch.testing.assert_close(rebuilt, matrices, rtol=0, atol=1e-12)
    if same:
        alone = rebuild(decompose(matrices[0], *pair, bond))
        assert max(errors) <= relative(alone[None], matrices[:1]) + 1e-9
    shapes = tensor_shapes(*pair, bond)
    whole = all(d * i * j == after for d, i, j, after in shapes[: middle - 1]) and all(
        d == i * j * after for d, i, j, after in shapes[middle + 2 :]
    )
    if whole and not sweeps and not bond:
        torch.testing.assert_close(rebuilt, matrices.mean(0).expand(rebuilt.shape))


def related(spread, experts=4):
    torch.manual_seed(0)
    common = torch.randn(64, 128)
    return common + spread * torch.randn(experts, 64, 128)


@pytest.mark.parametrize("bond", [0, 8])
@pytest.mark.parametrize("spread", [0.1, 1.0, 100.0])
def test_sweeps_never_make_it_worse(spread, bond):
    matrices = related(spread)
    totals = []
    for sweeps in (0, 1, 2, 4, 8):
        _, errors = factorise_together(matrices, *SHAPES, bond, sweeps)
        sizes = matrices.double().norm(dim=(1, 2))
        totals.append(float((torch.tensor(errors) * sizes).square().sum()))
    assert all(after <= before * (1 + 1e-9) for before, after in zip(totals, totals[1:]))
    assert totals[-1] < 0.99 * totals[0]


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_larger_bonds_are_closer(spread):
    matrices, errors = related(spread, 3), []
    for bond in (1, 2, 4, 8, 16, 24, 0):
        errors.append(sum(factorise_together(matrices, *SHAPES, bond)[1]))
    assert all(after <= before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 1e-12 if not spread else errors[-1] > 0.1


def test_it_finds_most_of_what_is_there():
    """Matrices that have a central tensor in common, with outer ones near each other."""
    torch.manual_seed(0)
    middle = len(SHAPES[0]) // 2
    tensors = []
    for k, shape in enumerate(tensor_shapes(*SHAPES)):
        base = torch.randn(shape, dtype=torch.float64)
        tensors.append(base if k == middle else base + 0.3 * torch.randn(4, *shape).double())
    matrices = rebuild(tensors)
    mean = matrices.mean(0, keepdim=True).expand_as(matrices)
    _, errors = factorise_together(matrices, *SHAPES, sweeps=200)
    assert max(errors) < 0.1 * relative(mean, matrices).min()


def test_single_precision_and_matrices_of_zeros():
    matrices = related(0.3).float()
    double = factorise_together(matrices.double(), *SHAPES)[1]
    assert factorise_together(matrices, *SHAPES)[1] == pytest.approx(double, rel=1e-6)
    tensors, errors = factorise_together(torch.zeros(2, 64, 128), *SHAPES)
    assert all(tensor.isfinite().all() for tensor in tensors) and max(errors) == 0
