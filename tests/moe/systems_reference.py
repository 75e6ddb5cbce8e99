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
    out = torch.stack(out) if out else tokens
    return Reference(out, passes, visits, at_gate, chosen)


def ffn(experts, e, h, activation=torch.relu):
    """Expert ``e`` of ``FFNExperts``."""
    hidden = activation(h @ experts.fc1_weight[e] + experts.fc1_bias[e])
    return hidden @ experts.fc2_weight[e] + experts.fc2_bias[e]


def choose_top_k(block, k):
    """``choose`` of the paper's gate in evaluation: the k best experts; the weights of two are
    renormalised."""

    def choose(i, h):
        p_E = (block.gates[i].weight @ h).softmax(0)
        taken = sorted(range(len(p_E)), key=lambda e: -p_E[e].item())[:k]
        total = sum(p_E[e] for e in taken) if len(taken) > 1 else 1
        first = block.visible[i].start
        return {first + e: p_E[e] / total for e in taken}, first + taken[0]

    return choose


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


# --------------------------------------------------------------------------------------
# MPOE and PESC


def tensor_product(experts, e, h):
    """Expert ``e`` of ``TensorProductExperts``: its tensors contracted from first to last."""
    stratum = next(i for i in range(len(experts.strata)) if e < sum(experts.strata[: i + 1]))
    place = stratum if len(experts.common.fc1_central) > 1 else 0
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
        own = getattr(experts, f"{layer}_bias", None)
        h = h + (getattr(experts.common, f"{layer}_bias")[place] if own is None else own[e])
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
