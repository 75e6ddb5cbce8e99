"""Which small experts a row chooses (MoEfication).

Letters in names: N rows, D model dim, P small experts of one feed-forward network, W hidden units
of each, K small experts that a row keeps.
"""

import torch
import torch.nn.functional as F

ROUTER_NAMES = {
    "mlp": ("router_in", "router_out"),
    "similarity": ("router_in",),
    "oracle": (),
}


def router_shapes(select, num_experts, embed_dim):
    """``{name: shape}`` of the parameters of a router."""
    shapes = {"router_in": (num_experts, embed_dim), "router_out": (num_experts, num_experts)}
    return {name: shapes[name] for name in ROUTER_NAMES[select]}


def scores(select, rows_ND, router_in_PD, router_out_PP=None):
    """Scores of the small experts, in float32 at least.

    "mlp" is ``out tanh(in x / |x|)``, "similarity" the product with the mean vector of an expert's
    hidden units.

    Returns:
        (N, P)
    """
    exact = torch.promote_types(rows_ND.dtype, torch.float32)
    rows_ND, router_in_PD = rows_ND.to(exact), router_in_PD.to(exact)
    products_NP = F.linear(rows_ND, router_in_PD)
    if select == "similarity":
        return products_NP
    length_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
    return F.linear(torch.tanh(products_NP / length_N1.clamp_(min=1e-12)), router_out_PP.to(exact))


def true_scores(hidden_NU, num_experts):
    """What routers are to predict: for each small expert the sum of its units after ReLU.

    Args:
        hidden_NU: hidden units after ReLU, those of a small expert together.

    Returns:
        (N, P)
    """
    return hidden_NU.unflatten(1, (num_experts, -1)).sum(2)


def centres(fc1_weight_PWD):
    """The mean direction (P, D) of the input vectors of each small expert's units."""
    return F.normalize(F.normalize(fc1_weight_PWD, dim=-1).mean(dim=-2), dim=-1)
