"""Matrices as chains of small tensors, matrix product operators (MPOE, arXiv 2203.01104).

A matrix of I rows and J columns, with I = i1 * ... * in and J = j1 * ... * jn, is the contraction
of n tensors. Tensor k has the shape (d, i_k, j_k, d'). Its bond d' is the bond d of the next
tensor; the outermost bonds are 1. The tensor in the middle is the central one, which has most of
the numbers.
"""

import math
from functools import reduce

import torch


def balanced_shape(width, length=5):
    """``length`` factors of ``width`` that are nearly equal, with the largest in the middle:
    2048 -> (4, 4, 8, 4, 4). These are the shapes of the authors' code at its widths."""
    factors, rest, prime = [1] * length, width, 2
    primes = []
    while rest > 1:
        if rest % prime:
            prime += 1
        else:
            rest //= prime
            primes.append(prime)
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    factors.sort()
    middle = length // 2
    return (*factors[:middle], *reversed(factors[middle:]))


def tensor_shapes(in_shape, out_shape, bond=0):
    """Shapes (d, i, j, d') of the tensors of a matrix.

    Args:
        in_shape, out_shape: factors of the numbers of rows and of columns.
        bond: limit of the bonds; 0 for none, so that any matrix has an exact decomposition.
    """
    sizes = [i * j for i, j in zip(in_shape, out_shape)]
    bonds = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(len(sizes) + 1)]
    bonds = [min(full, bond) if bond else full for full in bonds]
    return list(zip(bonds, in_shape, out_shape, bonds[1:]))


def decompose(matrix_IJ, in_shape, out_shape, bond=0):
    """The tensors of a matrix, by singular value decompositions from both ends (TT-SVD).

    The tensors before the central one have orthonormal columns as (d * i * j, d') matrices, those
    after it orthonormal rows as (d, i * j * d'). The central one has the scale of the matrix.

    Args:
        matrix_IJ: of any floating-point type, in which it is decomposed.
        in_shape, out_shape, bond: see :func:`tensor_shapes`.

    Returns:
        List of (d, i, j, d'). :func:`rebuild` gives the matrix again, exactly up to rounding where
        the bonds are not limited.
    """
    length, middle = len(in_shape), len(in_shape) // 2
    in_turn = [axis for k in range(length) for axis in (k, length + k)]
    rest = matrix_IJ.reshape(*in_shape, *out_shape).permute(in_turn)
    shapes = tensor_shapes(in_shape, out_shape, bond)
    tensors = [None] * length
    for k in range(middle):
        d, i, j, after = shapes[k]
        u, s, vh = torch.linalg.svd(rest.reshape(d * i * j, -1), full_matrices=False)
        tensors[k], rest = u[:, :after].reshape(shapes[k]), s[:after, None] * vh[:after]
    for k in range(length - 1, middle, -1):
        d, i, j, after = shapes[k]
        u, s, vh = torch.linalg.svd(rest.reshape(-1, i * j * after), full_matrices=False)
        tensors[k], rest = vh[:d].reshape(shapes[k]), u[:, :d] * s[:d]
    tensors[middle] = rest.reshape(shapes[middle])
    return tensors


def rebuild(tensors):
    """The matrix of some tensors.

    Args:
        tensors: each (d, i, j, d'), or (E, d, i, j, d') for those of E matrices. Matrices may have
            some tensors in common.

    Returns:
        (I, J) or (E, I, J)
    """
    product = _contract(tensors, _join, [tuple(tensor.shape[-4:]) for tensor in tensors])
    return product.squeeze(-4).squeeze(-1)


def rebuild_flops(shapes):
    """FLOPs of :func:`rebuild` for one matrix with tensors of these shapes."""
    return _contract([(shape, 0) for shape in shapes], _join_flops, shapes)[1]


def _contract(items, join, shapes):
    """Join the tensors before the central one, those after it, and then the central one first with
    the side that makes this cheaper."""
    middle = len(items) // 2
    left = reduce(join, items[:middle])
    right = reduce(lambda later, item: join(item, later), reversed(items[middle + 1 :]))
    rows = math.prod(i * j for _, i, j, _ in shapes[:middle])
    columns = math.prod(i * j for _, i, j, _ in shapes[middle + 1 :])
    before, _, _, after = shapes[middle]
    # left first: rows * after * (before + columns), both times the central tensor's i * j
    if rows * after * (before + columns) <= before * columns * (after + rows):
        return join(join(left, items[middle]), right)
    return join(left, join(items[middle], right))


def _join(first, second):
    """(..., d, i, j, b) and (..., b, k, m, f) -> (..., d, i * k, j * m, f)"""
    d, i, j, _ = first.shape[-4:]
    _, k, m, f = second.shape[-4:]
    # leading dimensions differ where one is shared; matmul then makes one product of it
    product = first.flatten(-4, -2) @ second.flatten(-3, -1)
    lead = product.shape[:-2]
    product = product.view(*lead, d, i, j, k, m, f).transpose(-4, -3)
    return product.reshape(*lead, d, i * k, j * m, f)


def _join_flops(first, second):
    ((d, i, j, b), done), ((_, k, m, f), more) = first, second
    return (d, i * k, j * m, f), done + more + 2 * d * i * j * b * k * m * f
