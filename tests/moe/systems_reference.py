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
# DynMoE: --moe-gate top-any


def top_any_margins(gate, h):
    """sigmoid(cos(x, w_e)) - sigmoid(G_e) of each expert; an expert is active above 0."""
    cosines = [h @ w / (h.norm() * w.norm()) for w in gate.weight]
    return [torch.sigmoid(s) - torch.sigmoid(g) for s, g in zip(cosines, gate.threshold)]


def top_any_activations(gate, h):
    """``{expert: activation}`` of the live experts, numbered as the gate does: 0 or 1, with the
    gradient of the margin."""
    margins = top_any_margins(gate, h)
    live = [e for e in range(len(margins)) if gate.alive_E[e]]
    active = {e for e in live if margins[e] > 0}
    if not active and not gate.training:
        active = {max(live, key=lambda e: margins[e])}
    return {e: (e in active) + margins[e] - margins[e].detach() for e in live}


def top_any(block):
    """``choose`` for :func:`run`."""

    def choose(i, h):
        gate, first = block.gates[i], block.visible[i].start
        margins, activations = top_any_margins(gate, h), top_any_activations(gate, h)
        active = [e for e, a in activations.items() if a > 0.5]
        own = [e for e in activations if e < block.strata[i]]
        best = max(active or own, key=lambda e: margins[e])
        weights = {first + e: activations[e] / len(active) for e in active}
        return weights, first + best

    return choose


def top_any_losses(gate, tokens):
    """The named losses of one gate, for the tokens that are at it."""
    live = [e for e, alive in enumerate(gate.alive_E) if alive]
    vectors = [gate.weight[e] for e in live]
    squares = [(v @ w / (v.norm() * w.norm())) ** 2 for v in vectors for w in vectors if v is not w]
    shares, efficiency = [], gate.weight.sum() * 0
    for h in tokens:
        activations = top_any_activations(gate, h)
        number = sum(a > 0.5 for a in activations.values())
        efficiency = efficiency + sum(activations.values()) / len(live) / len(tokens)
        if number:
            shares.append([activations[e] / number for e in live])
    means = [sum(of_expert) / len(shares) for of_expert in zip(*shares)]
    return {
        "moe_gate_loss": len(live) * sum((m.detach() * m for m in means), gate.weight.sum() * 0),
        "gate_diversity": sum(squares, gate.weight.sum() * 0).sqrt() if squares else 0,
        "gate_simplicity": sum(v.norm() for v in vectors) / len(live),
        "gate_efficiency": efficiency,
    }
