"""Dividing the hidden units of a network among small experts of equal size.

Letters in names: F hidden units, D model dim, P small experts, W units of each, T tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

MOST_ROUNDS = 50
PARTNERS = 128  # edges of a unit in the graph of co-activation
HEAVIEST = 10000  # weight of the heaviest edge, an integer
AT_ONCE = 1024  # tokens


def split(how, weight_FD, bias_F, tokens_TD, num_experts, seed):
    """The hidden units in a new order: those of the first small expert, then those of the second,
    and so on.

    Args:
        how: "cluster", "graph" or "random".
        weight_FD, bias_F: the first layer.
        tokens_TD: what goes into it.
        seed: of all that is random.

    Returns:
        (F,) int64
    """
    random = np.random.default_rng(seed)
    if how == "random":
        expert_F = random.permutation(len(weight_FD)) % num_experts
    elif how == "cluster":
        expert_F = balanced_k_means(F.normalize(weight_FD, dim=1).numpy(), num_experts, random)
    else:
        together_FF = co_activation(weight_FD, bias_F, tokens_TD).numpy()
        expert_F = balanced_graph_parts(together_FF, num_experts)
    return torch.from_numpy(np.argsort(expert_F, kind="stable"))


def balanced_k_means(vectors_FD, num_clusters, random):
    """k-means with clusters of equal size. Each round assigns all vectors at once so that the sum
    of the distances is the least possible.

    Returns:
        (F,) cluster of each vector.
    """
    first = random.choice(len(vectors_FD), num_clusters, replace=False)
    centres_PD, cluster_F = vectors_FD[first], None
    for _ in range(MOST_ROUNDS):
        # of vectors and centres, the distance is a constant of the vector minus this
        nearness_FP = 2 * vectors_FD @ centres_PD.T - (centres_PD**2).sum(1)
        before, cluster_F = cluster_F, assign_equally(nearness_FP)
        if before is not None and (before == cluster_F).all():
            break
        centres_PD = np.stack([vectors_FD[cluster_F == p].mean(0) for p in range(num_clusters)])
    return cluster_F


def assign_equally(value_FP):
    """Assign F things to P places, equally many to each, with the highest sum of values.

    Returns:
        (F,) place of each.
    """
    number, places = value_FP.shape
    seats = number // places
    _, seat_F = linear_sum_assignment(np.repeat(value_FP, seats, axis=1), maximize=True)
    return seat_F // seats


def co_activation(weight_FD, bias_F, tokens_TD):
    """How strongly units are active together: the sum of ``h_n h_m`` over all tokens, where h is
    after ReLU. (F, F), with zeros on the diagonal."""
    together_FF = weight_FD.new_zeros(len(weight_FD), len(weight_FD))
    for tokens in tokens_TD.split(AT_ONCE):
        hidden_TF = F.linear(tokens, weight_FD, bias_F).relu_()
        together_FF.addmm_(hidden_TF.t(), hidden_TF)
    return together_FF.fill_diagonal_(0)


def balanced_graph_parts(together_FF, num_parts):
    """Parts of equal size with as much co-activation inside them as METIS finds.

    METIS balances the parts only roughly. The units are then assigned anew, to the part with whose
    units they are most active, equally many to each.

    Returns:
        (F,) part of each unit.
    """
    import pymetis

    number = len(together_FF)
    partners = min(PARTNERS, number - 1)
    strongest = np.argpartition(-together_FF, partners - 1, axis=1)[:, :partners]
    edge_FF = np.zeros_like(together_FF)
    np.put_along_axis(edge_FF, strongest, np.take_along_axis(together_FF, strongest, 1), 1)
    edge_FF = np.maximum(edge_FF, edge_FF.T)
    weight_FF = np.ceil(edge_FF * (HEAVIEST / max(edge_FF.max(), 1e-30))).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum((weight_FF > 0).sum(1))])
    unit, partner = np.nonzero(weight_FF)
    graph = pymetis.CSRAdjacency(starts.tolist(), partner.tolist())
    _, part = pymetis.part_graph(num_parts, graph, eweights=weight_FF[unit, partner].tolist())
    inside_FP = together_FF @ np.eye(num_parts, dtype=together_FF.dtype)[np.asarray(part)]
    return assign_equally(inside_FP)
