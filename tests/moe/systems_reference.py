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


def run(block, tokens, choose, apply, leave=None):
    """Send tokens through the strata (paper, eq. 4-7), without dropout, capacity and padding.

    Args:
        block: an ``SMoEBlock``; its strata and LayerNorms are used.
        tokens: (T, D).
        choose: ``choose(gate, h)`` returns ``({expert: weight}, best expert)`` for the normalised
            token ``h`` (D,) at a gate; experts are numbered from the first of the block.
        apply: ``apply(expert, h)`` returns the output (D,) of an expert.
        leave: ``leave(h)`` returns what a token gets besides in its last pass.
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
            if leave is not None and stratum_of[best] == len(strata) - 1:
                token = token + leave(h)
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
# MPOE and PESC


def top_k(block, k):
    """``choose`` of the paper's gate in evaluation: for one expert its probability, for two those
    of both, renormalised."""

    def choose(gate, h):
        first = sum(block.strata[:gate])
        probs = (block.gates[gate].weight @ h).softmax(0)
        best = sorted(range(len(probs)), key=lambda e: -probs[e])[:k]
        total = sum(probs[e] for e in best) if k > 1 else 1
        return {first + e: probs[e] / total for e in best}, first + best[0]

    return choose


def tensor_product(experts, e, h):
    """Expert ``e`` of ``TensorProductExperts``: its tensors contracted from first to last."""
    stratum = next(i for i in range(len(experts.strata)) if e < sum(experts.strata[: i + 1]))
    place = stratum if len(experts.common.fc1_bias) > 1 else 0
    for layer in ("fc1", "fc2"):
        names = [f"{layer}_tensor{k + 1}" for k in range(len(experts.shapes[layer]))]
        tensors = [getattr(experts, n)[e] if hasattr(experts, n) else None for n in names]
        tensors[tensors.index(None)] = getattr(experts.common, f"{layer}_central")[place]
        matrix = tensors[0]
        for tensor in tensors[1:]:
            matrix = torch.tensordot(matrix, tensor, dims=1)
        matrix = matrix.squeeze(-1).squeeze(0)  # (i1, j1, i2, j2, ...)
        axes = range(matrix.dim())
        h = matrix.permute(*axes[::2], *axes[1::2]).reshape(len(h), -1).t() @ h
        h = h + getattr(experts.common, f"{layer}_bias")[place]
        h = h.relu() if layer == "fc1" else h
    return h


def shared_ffn(experts, h):
    """The FFN in front of the adapters of ``AdapterExperts``."""
    fc1, fc2 = experts.ffn.fc1, experts.ffn.fc2
    return fc2.weight @ (fc1.weight @ h + fc1.bias).relu() + fc2.bias


def adapter(experts, e, h):
    """Expert ``e`` of ``AdapterExperts``, without the skip connection."""
    if e >= sum(experts.strata[:-1]):
        h = shared_ffn(experts, h)
    return (h @ experts.down_weight[e]).relu() @ experts.up_weight[e] * experts.options.pesc_scale
