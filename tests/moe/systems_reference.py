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
    out = torch.stack(out) if out else tokens
    return Reference(out, passes, visits, at_gate, chosen)


def ffn(experts, e, h, activation=torch.relu):
    """Expert ``e`` of ``FFNExperts``."""
    hidden = activation(h @ experts.fc1_weight[e] + experts.fc1_bias[e])
    return hidden @ experts.fc2_weight[e] + experts.fc2_bias[e]


def assert_block_is(block, x, padding, choose, apply, losses):
    """Compare a block with :func:`run`: outputs, numbers of passes and experts, named losses, and
    the gradients of every parameter and of the input.

    Args:
        x: (T, D) in float64.
        padding: (T,) bool.
        losses: ``{name: function of block and Reference}``
    """
    close = {"rtol": 1e-9, "atol": 1e-9}
    x = x.clone().requires_grad_()
    y, stats = block(x, padding)
    reference = run(block, x[~padding], choose, apply)
    expected = x.index_copy(0, (~padding).nonzero().squeeze(1), reference.out)
    torch.testing.assert_close(y, expected, **close)
    assert stats.passes[~padding].tolist() == reference.passes
    assert not stats.passes[padding].any()
    assert sum(int(gate.num_visits) for gate in stats.gates) == sum(reference.visits)
    assert stats.losses.keys() == losses.keys()
    ours, theirs = (y * y.detach().cos()).sum(), (expected * y.detach().cos()).sum()
    for name, loss in losses.items():
        value = torch.as_tensor(loss(block, reference), dtype=x.dtype)
        torch.testing.assert_close(stats.losses[name], value, **close, msg=name)
        ours, theirs = ours + stats.losses[name], theirs + value
    named = [("x", x), *block.named_parameters()]
    gradients = [
        torch.autograd.grad(loss, [tensor for _, tensor in named], materialize_grads=True)
        for loss in (ours, theirs)
    ]
    for (name, _), got, wanted in zip(named, *gradients):
        torch.testing.assert_close(got, wanted, **close, msg=name)


def mean_over_gates(of_gate):
    """A loss of a block: the mean of ``of_gate(p_TE, chosen_T, visible)`` over its gates, which is
    0 for a gate without tokens. The experts in ``chosen_T`` are numbered from the block's first."""

    def loss(block, reference):
        total = 0
        for i, tokens in enumerate(reference.at_gate):
            if tokens:
                p_TE = torch.stack([(block.gates[i].weight @ h).softmax(0) for h in tokens])
                total += of_gate(p_TE, reference.chosen[i], block.visible[i])
        return total / len(block.strata)

    return loss


@mean_over_gates
def balance(p_TE, chosen_T, visible):
    num_tokens, num_experts = p_TE.shape
    best = p_TE.argmax(dim=1).tolist()
    shares = [best.count(e) / num_tokens for e in range(num_experts)]
    return num_experts * sum(f * p for f, p in zip(shares, p_TE.mean(dim=0)))


# --------------------------------------------------------------------------------------
# XMoE (arXiv 2403.18926)


def choose_by_threshold(block, thresholds, renormalised):
    """Take experts by falling probability until their sum reaches the threshold of the stratum."""

    def choose(i, h):
        p_E = (block.gates[i].weight @ h).softmax(0)
        ranked = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())
        taken, mass = [], 0.0
        for e in ranked:
            if not taken or mass < thresholds[i] or thresholds[i] == 1:
                taken.append(e)
                mass += p_E[e].item()
        total = sum(p_E[e] for e in taken) if renormalised else 1
        first = block.visible[i].start
        return {first + e: p_E[e] / total for e in taken}, first + ranked[0]

    return choose


# --------------------------------------------------------------------------------------
# HMoE (arXiv 2408.10681)


def choose_top_k(block, k):
    """The k best experts; the weights of two are renormalised."""

    def choose(i, h):
        p_E = (block.gates[i].weight @ h).softmax(0)
        taken = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[:k]
        total = sum(p_E[e] for e in taken) if len(taken) > 1 else 1
        first = block.visible[i].start
        return {first + e: p_E[e] / total for e in taken}, first + taken[0]

    return choose


def sized_ffn(experts, widths, e, h, activation=torch.relu):
    """Expert ``e`` of ``SizedExperts``: the first ``widths[e]`` of the stored hidden units."""
    own = slice(widths[e])
    hidden = activation(h @ experts.fc1_weight[e][:, own] + experts.fc1_bias[e][own])
    return hidden @ experts.fc2_weight[e][own] + experts.fc2_bias[e]


def p_penalty(widths):
    """N sum_i M_i P_i (eq. 6), with widths relative to the mean of those that the gate sees."""

    @mean_over_gates
    def loss(p_TE, chosen_T, visible):
        mean = sum(widths[e] for e in visible) / len(visible)
        total = 0
        for e, p in zip(visible, p_TE.mean(dim=0)):
            share = sum(e in chosen for chosen in chosen_T) / len(chosen_T)
            total = total + share * widths[e] / mean * p
        return len(visible) * total

    return loss


@mean_over_gates
def entropy(p_TE, chosen_T, visible):
    return -sum((p * p.log()).sum() for p in p_TE) / len(p_TE)
