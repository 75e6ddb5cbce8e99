"""The systems of docs/systems.md from their equations: token by token, expert by expert.

Each function works with the parameters of a block, but calls none of its code.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reference:
    """What a block should return for some tokens.

    Attributes:
        out: (T, D).
        passes: for each token the number of passes.
        visits: for each token the number of experts, in all passes.
        at_gate: for each gate the list of normalised tokens that were at it.
        chosen: for each gate the list of the choices of these tokens, ``{expert: weight}``.
    """

    out: torch.Tensor
    passes: list
    visits: list
    at_gate: list
    chosen: list


def run(block, tokens, choose, apply):
    """Send tokens through the strata (paper, eq. 4-7), without dropout, capacity and padding.

    Args:
        block: an ``SMoEBlock``; its strata and LayerNorms are used.
        tokens: (T, D).
        choose: ``choose(gate, h)`` returns ``({expert: weight}, best expert)`` for the normalised
            token ``h`` (D,) at a gate; experts are numbered from the first of the block.
        apply: ``apply(expert, h)`` returns the output (D,) of an expert.
    """
    strata = block.strata
    stratum_of = [i for i, size in enumerate(strata) for _ in range(size)]
    at_gate, chosen = [[] for _ in strata], [[] for _ in strata]
    out, passes, visits = [], [], []
    for token in tokens:
        gate = num_passes = num_visits = 0
        while gate < len(strata):
            h = block.norms[gate](token)
            weights, best = choose(gate, h)
            at_gate[gate].append(h)
            chosen[gate].append(weights)
            for expert, weight in weights.items():
                token = token + weight * apply(expert, h)
            num_visits += len(weights)
            num_passes += 1
            gate = stratum_of[best] + 1
        out.append(token)
        passes.append(num_passes)
        visits.append(num_visits)
    return Reference(torch.stack(out), passes, visits, at_gate, chosen)


def ffn(experts, e, h, activation=torch.relu):
    """Expert ``e`` of ``FFNExperts``."""
    hidden = activation(h @ experts.fc1_weight[e] + experts.fc1_bias[e])
    return hidden @ experts.fc2_weight[e] + experts.fc2_bias[e]


# --------------------------------------------------------------------------------------
# MH-MoE


def multi_head(sublayer, tokens, run_block):
    """Eq. 3-7 of Wu et al. 2024 in a pre-norm sublayer.

    Args:
        sublayer: a ``MultiHeadBlock``; the weights of its LayerNorm and projections are used.
        run_block: ``run_block(heads)`` returns the :class:`Reference` of the block for all heads,
            (T * H, D / H).

    Returns:
        The output (T, D), and the reference of the heads.
    """
    heads = []
    for token in tokens:
        projected = sublayer.head.weight @ sublayer.norm(token) + sublayer.head.bias
        heads += projected.split(len(token) // sublayer.heads)
    found = run_block(torch.stack(heads)) if heads else None
    out = []
    for t, token in enumerate(tokens):
        own = range(t * sublayer.heads, (t + 1) * sublayer.heads)
        parts = [found.out[n] for n in own]
        if sublayer.residual == "released":
            parts = [part - heads[n] for part, n in zip(parts, own)]
        out.append(token + sublayer.merge.weight @ torch.cat(parts) + sublayer.merge.bias)
    return torch.stack(out), found
