"""Matching the hidden units of experts, so that their weights can be averaged.

An expert computes the same if its hidden units change places. Experts that have learned the same
may therefore have it at different places, and the mean of their weights would mix units that have
nothing in common.

Letters in names: F hidden units, K weights of a unit.
"""

import torch
from scipy.optimize import linear_sum_assignment


def matching(reference_FK, other_FK):
    """The order of an expert's hidden units that is nearest to another's: the permutation with the
    smallest sum of squared differences to the reference (Ainsworth et al. 2023, arXiv 2209.04836,
    section 3.2).

    Returns:
        (F,) int64, the unit of the other expert for each of the reference.
    """
    # the lengths of the rows do not depend on the order, so the products decide
    products_FF = reference_FK.double() @ other_FK.double().t()
    _, order_F = linear_sum_assignment(products_FF.cpu().numpy(), maximize=True)
    return torch.from_numpy(order_F)


def units(tensors, e):
    """All weights of each hidden unit of expert ``e``, (F, K).

    Args:
        tensors: stacked parameters of two layers, ``W1 (E, D, F), b1 (E, F), W2 (E, F, D), b2``;
            ``b1`` may be None.
    """
    w1, b1, w2, _ = tensors
    columns = [w1[e].t(), w2[e]] + ([] if b1 is None else [b1[e].unsqueeze(1)])
    return torch.cat(columns, dim=1)


def align(tensors, groups, references):
    """Copies of some experts' parameters, with the hidden units of the experts of each group in the
    order of one of them.

    Args:
        tensors: see :func:`units`.
        groups: lists of experts.
        references: the expert of each group that stays as it is.

    Returns:
        ``(W1, b1, W2, b2)``; what stays is not copied.
    """
    if all(len(members) == 1 for members in groups):
        return tensors
    w1, b1, w2 = (None if tensor is None else tensor.clone() for tensor in tensors[:3])
    for members, reference in zip(groups, references):
        for e in members:
            if e == reference:
                continue
            order_F = matching(units(tensors, reference), units(tensors, e))
            w1[e], w2[e] = tensors[0][e][:, order_F], tensors[2][e][order_F]
            if b1 is not None:
                b1[e] = tensors[1][e][order_F]
    return w1, b1, w2, tensors[3]
