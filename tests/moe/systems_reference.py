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
