"""Matrices of several experts as chains of small tensors, with the central one in common.

:mod:`fairseq_smoe.moe.matrix_product` has the chains of one matrix. E different matrices with one
central tensor C have no exact decomposition, however large the bonds. With the rows and columns of
all tensors before C joined to l, and those after it to r, matrix e is approximated by
``A_e C B_e``, where A_e and B_e are the products of its own tensors. Begin with the decomposition
of the mean matrix. Then solve for each A_e, each B_e and C in turn. Each of these is a linear
least-squares problem (alternating least squares), so that the error never grows.

Letters in names: E matrices, I and J their rows and columns, l, m, r those joined before, in and
after the central tensor, a and b its bonds, p and q what a matrix's own outermost tensors, if they
have a limited bond, leave of l and r.
"""

from dataclasses import dataclass

import torch

from fairseq_smoe.moe.matrix_product import decompose, rebuild, tensor_shapes

SWEEPS = 30
TOLERANCE = 1e-3  # sweeps end when one makes the error smaller by less than this part of it
_CG_STEPS = 4  # conjugate-gradient steps for the central tensor in each sweep
_EXACT = 1e-13  # relative error below which nothing is left to fit
_RANK = 1e-14  # eigenvalues below this part of the greatest count as 0


@dataclass
class _Member:
    """One of the matrices.

    Attributes:
        left, right: bases of its outermost tensors, from both ends inwards, as matrices whose
            columns are orthonormal.
        rest: (p, m, q), the matrix in these bases.
        a, b: (p, a) and (b, q), its tensors next to the central one.
    """

    left: list
    right: list
    rest: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


def factorise_together(matrices_EIJ, in_shape, out_shape, bond=0, sweeps=SWEEPS):
    """Tensors of E matrices, all of which have the central one in common.

    Args:
        matrices_EIJ: of any floating-point type; the results are float64.
        in_shape, out_shape, bond: see :func:`~fairseq_smoe.moe.matrix_product.tensor_shapes`.
        sweeps: most sweeps of alternating least squares. With 0, all matrices become their mean, or
            what of it lies in the space of each matrix if its outermost bonds are limited.

    Returns:
        ``(tensors, errors)``: for each place of the chain (E, d, i, j, d'), but (d, i, j, d') for
        the central one; and for each matrix the Frobenius norm of the error, relative to that of
        the matrix. :func:`~fairseq_smoe.moe.matrix_product.rebuild` gives the approximations. Equal
        matrices are exact up to rounding if the bonds are not limited.
    """
    shapes = tensor_shapes(in_shape, out_shape, bond)
    middle = len(shapes) // 2
    mean = sum(matrix.to(torch.float64) for matrix in matrices_EIJ) / len(matrices_EIJ)
    start = decompose(mean, in_shape, out_shape, bond)
    central_amb = start[middle].flatten(1, 2)
    members = [
        _member(_interleaved(matrix, in_shape, out_shape), shapes, start) for matrix in matrices_EIJ
    ]
    central_amb = _sweep(members, central_amb, sweeps)
    tensors = [torch.stack(own) for own in zip(*(_tensors(one, shapes) for one in members))]
    tensors.insert(middle, central_amb.reshape(shapes[middle]))
    return tensors, [_error(matrix, tensors, e) for e, matrix in enumerate(matrices_EIJ)]


def _error(matrix_IJ, tensors, e):
    own = [tensor if k == len(tensors) // 2 else tensor[e] for k, tensor in enumerate(tensors)]
    matrix_IJ = matrix_IJ.to(torch.float64)
    return float((rebuild(own) - matrix_IJ).norm() / matrix_IJ.norm().clamp(min=1e-300))


# --------------------------------------------------------------------------------------
# the ends of the chains


def _interleaved(matrix_IJ, in_shape, out_shape):
    """A matrix as (i1 j1, i2 j2, ...), in float64."""
    length = len(in_shape)
    in_turn = [axis for k in range(length) for axis in (k, length + k)]
    chain = matrix_IJ.reshape(*in_shape, *out_shape).permute(in_turn)
    return chain.to(torch.float64).reshape([i * j for i, j in zip(in_shape, out_shape)])


def _member(rest, shapes, start):
    """A matrix, in the form of :func:`_interleaved`, with the tensors of another to start from."""
    middle = len(shapes) // 2
    num_central = shapes[middle][1] * shapes[middle][2]
    a, b = _joined(start[:middle]), _joined(start[middle + 1 :])
    left, right = [], []
    for d, i, j, after in shapes[: middle - 1]:
        rest = rest.reshape(d * i * j, -1)
        basis = _leading(rest, after)
        left.append(basis)
        rest, a = basis.t() @ rest, basis.t() @ a.reshape(len(basis), -1)
    a = a.reshape(-1, shapes[middle][0])
    # of these rows alone, as in the decomposition of one matrix
    kept = torch.linalg.qr(a)[0].t() @ rest.reshape(len(a), -1)
    for d, i, j, after in shapes[: middle + 1 : -1]:
        kept, rest = (part.reshape(-1, i * j * after) for part in (kept, rest))
        basis = _leading(kept.t(), d)
        right.append(basis)
        kept, rest = kept @ basis, rest @ basis
        b = b.reshape(-1, len(basis)) @ basis
    b = b.reshape(shapes[middle][3], -1)
    return _Member(left, right, rest.reshape(len(a), num_central, b.shape[1]), a, b)


def _leading(rest, number):
    """The leading left singular vectors of a matrix as columns; the identity, if these are all."""
    if number == len(rest):
        return torch.eye(number, dtype=rest.dtype)
    return torch.linalg.svd(rest, full_matrices=False)[0][:, :number]


def _joined(tensors):
    """The product of some tensors of a chain, whose bond at one end is 1, as a tensor of any
    shape."""
    product = tensors[0].flatten(0, 2)
    for tensor in tensors[1:]:
        product = product.reshape(-1, len(tensor)) @ tensor.flatten(1)
    return product


def _tensors(member, shapes):
    """All tensors of a matrix but the central one."""
    middle = len(shapes) // 2
    left = [*member.left, member.a]
    right = [member.b, *(basis.t() for basis in reversed(member.right))]
    places = [*range(middle), *range(middle + 1, len(shapes))]
    return [flat.reshape(shapes[k]) for k, flat in zip(places, left + right)]


# --------------------------------------------------------------------------------------
# least squares


def _sweep(members, central_amb, sweeps):
    """Improve the tensors next to the central one, and the central one, in turn. Returns the
    latter."""
    size = sum(float(member.rest.square().sum()) for member in members)
    error = sum(map(float, (_missed(member, central_amb) for member in members)))
    for _ in range(sweeps):
        if error <= _EXACT**2 * size:
            break
        for member in members:
            _fit_outer(member, central_amb)
        central_amb = _scale_evenly(members, central_amb)
        central_amb, error, before = *_fit_central(members, central_amb, size), error
        if error > before * (1 - TOLERANCE) ** 2:
            break
    return central_amb


def _missed(member, central_amb):
    approximation = (member.a @ central_amb.flatten(1)).reshape(-1, len(member.b)) @ member.b
    return (member.rest.flatten(0, 1) - approximation).square().sum()


def _fit_outer(member, central_amb):
    """The best a for this b, then the best b for this a."""
    rest, (bond, num_central, _) = member.rest, central_amb.shape
    with_b = (central_amb.flatten(0, 1) @ member.b).reshape(bond, -1)
    member.a = _solve(rest.flatten(1) @ with_b.t(), with_b @ with_b.t())
    with_a = (member.a @ central_amb.flatten(1)).reshape(len(rest) * num_central, -1)
    member.b = _solve(rest.flatten(0, 1).t() @ with_a, with_a.t() @ with_a).t()


def _solve(right, gram):
    """``right @ gram^-1`` for a symmetric matrix, which may be singular."""
    values, vectors = torch.linalg.eigh(gram)
    inverse = torch.where(values > _RANK * values[-1].clamp(min=0), 1 / values, 0)
    return (right @ vectors) * inverse @ vectors.t()


def _scale_evenly(members, central_amb):
    """Move factors between the central tensor and the others, so that the latter keep norms on the
    average over the matrices. This changes no product, and makes the central tensor's problem
    well-conditioned. Returns the central tensor."""
    gram = sum(member.a.t() @ member.a for member in members) / len(members)
    root, inverse = _roots(gram)
    for member in members:
        member.a = member.a @ inverse
    central_amb = torch.tensordot(root, central_amb, 1)
    gram = sum(member.b @ member.b.t() for member in members) / len(members)
    root, inverse = _roots(gram)
    for member in members:
        member.b = inverse @ member.b
    return torch.tensordot(central_amb, root, 1)


def _roots(gram):
    """The root of a symmetric matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=_RANK * float(values[-1]) or 1).sqrt()
    return vectors * values @ vectors.t(), vectors / values @ vectors.t()


def _fit_central(members, central_amb, size):
    """Some steps towards the best central tensor, by conjugate gradients.

    Args:
        size: sum of the squares of all numbers in ``rest``.

    Returns:
        ``(central_amb, error)``: the error is the sum of squares over all matrices.
    """
    grams = [(member.a.t() @ member.a, member.b @ member.b.t()) for member in members]

    def normal(tensor_amb):
        return sum(_between(of_a, tensor_amb, of_b) for of_a, of_b in grams)

    wanted = sum(_between(member.a.t(), member.rest, member.b.t()) for member in members)
    residual = wanted - normal(central_amb)
    step, length = residual, residual.square().sum()
    for _ in range(_CG_STEPS):
        if float(length) == 0:
            break
        moved = normal(step)
        rate = length / (step * moved).sum()
        central_amb, residual = central_amb + rate * step, residual - rate * moved
        length, last = residual.square().sum(), length
        step = residual + length / last * step
    error = size - float(((wanted + residual) * central_amb).sum())
    return central_amb, max(error, 0.0)


def _between(left, tensor, right):
    """A product from both sides: (x, p), (p, m, q), (q, y) -> (x, m, y)"""
    product = (left @ tensor.flatten(1)).reshape(len(left) * tensor.shape[1], -1) @ right
    return product.reshape(len(left), tensor.shape[1], -1)
