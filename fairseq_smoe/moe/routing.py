"""Routing of one gate, as pure functions.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, K choices per token.
"""

import math

import torch
import torch.nn.functional as F


def gate_logits(tokens_TD, weight_ED, bias_E=None):
    """Logits of a gate (paper, eq. 5), in at least float32.

    Half precision has too few digits to distinguish experts with similar logits, and overflows in
    the softmax. The gate therefore computes in float32, under autocast too.
    """
    dtype = torch.promote_types(tokens_TD.dtype, torch.float32)
    with torch.autocast(tokens_TD.device.type, enabled=False):
        bias_E = None if bias_E is None else bias_E.to(dtype)
        return F.linear(tokens_TD.to(dtype), weight_ED.to(dtype), bias_E)


def choose_experts(logits_TE, top_k, sample_second=False):
    """The experts each token visits, best first.

    Args:
        logits_TE: gate logits.
        top_k: choices per token, 1 or 2; a gate that sees a single expert gives one choice.
        sample_second: draw the second expert from the remaining probabilities (by Gumbel noise)
            instead of taking the highest.

    Returns:
        (K, T) int64.
    """
    if min(top_k, logits_TE.shape[1]) == 1:
        return logits_TE.argmax(dim=1).unsqueeze(0)
    if not sample_second:
        return logits_TE.topk(2, dim=1).indices.t()
    first_T = logits_TE.argmax(dim=1)
    # Gumbel-max: argmax of logits + noise is a draw from their softmax
    noise_TE = -torch.empty_like(logits_TE).exponential_().log()
    others_TE = (logits_TE.detach() + noise_TE).scatter(1, first_T.unsqueeze(1), -math.inf)
    return torch.stack([first_T, others_TE.argmax(dim=1)])


def select_top_p(scores_TE, threshold):
    """The best experts of each token, as few as have together at least a probability.

    Args:
        scores_TE: gate probabilities.
        threshold: up to 0 only the best expert; from 1 on all, whatever the rounding of the sum.

    Returns:
        (T, E) bool. The best expert is always among them.
    """
    if threshold >= 1:
        return torch.ones_like(scores_TE, dtype=torch.bool)
    sorted_TE, order_TE = scores_TE.detach().sort(dim=1, descending=True, stable=True)
    better_TE = F.pad(sorted_TE.cumsum(dim=1)[:, :-1], (1, 0))  # sum over all better experts
    taken_TE = better_TE < threshold
    taken_TE[:, 0] = True
    return torch.zeros_like(taken_TE).scatter(1, order_TE, taken_TE)


def expert_capacity(num_tokens, num_experts, factor):
    """Maximum number of rows of an expert in training: ``factor`` times the even share.

    The even share is rounded up before the factor applies (paper, section 4.3, with factor 2; the
    rounding is that of the authors' runs).

    Args:
        num_tokens: a number or a scalar tensor; the result is of the same kind.
    """
    even_share = -(-num_tokens // num_experts)
    if isinstance(even_share, torch.Tensor):
        return (even_share * factor).floor().long()
    return math.floor(even_share * factor)


def combine_weights(scores_TE, experts_KT, kept_KT=None):
    """Weight of every choice in a token's output (paper, eq. 6).

    A single choice is weighted by its probability. The weights of two choices are renormalised to
    sum to 1 over those that were not dropped, as in GShard and the authors' code (the paper gives
    the bare probabilities).

    Args:
        scores_TE: gate probabilities.
        experts_KT: chosen experts.
        kept_KT: bool, False where the expert was full; None when nothing was dropped.

    Returns:
        (K, T), zero where a choice was dropped.
    """
    weights_KT = scores_TE.t().gather(0, experts_KT)
    if kept_KT is not None:
        weights_KT = weights_KT * kept_KT
    if len(experts_KT) > 1:
        total_T = weights_KT.sum(dim=0)
        weights_KT = weights_KT / total_T.clamp(min=torch.finfo(total_T.dtype).eps)
    return weights_KT


def renormalise(weights_C, token_C, expert_C, shape):
    """Weights divided by their sum over the choices of the same token.

    Args:
        token_C, expert_C: the choices, no pair twice.
        shape: T, E.
    """
    weights_TE = weights_C.new_zeros(shape).index_put((token_C, expert_C), weights_C)
    total_T1 = weights_TE.sum(dim=1, keepdim=True)
    return (weights_TE / total_T1.clamp(min=torch.finfo(total_T1.dtype).eps))[token_C, expert_C]


def parameter_penalty(scores_TE, token_C, expert_C, width_E, here_T=None):
    """Parameters that the tokens of one gate use: E * sum over e of f_e * p_e * w_e, where f_e is
    the share of tokens that visit e, p_e the mean probability of e, and w_e its width relative to
    the mean width of the E experts (HMoE, eq. 6, with the widths divided by their mean).

    With equal widths and one choice per token this is :func:`balance_loss`.

    Args:
        token_C, expert_C: the choices.
        width_E: widths of the experts.
        here_T: the tokens to count; None for all.
    """
    num_tokens, num_experts = scores_TE.shape
    counted_T = torch.ones_like(scores_TE[:, 0]) if here_T is None else here_T.to(scores_TE.dtype)
    num_tokens = max(num_tokens, 1) if here_T is None else counted_T.sum().clamp(min=1)
    counts_E = scores_TE.new_zeros(num_experts).index_add(0, expert_C, counted_T[token_C])
    share_E = (scores_TE if here_T is None else scores_TE * counted_T.unsqueeze(1)).sum(dim=0)
    cost_E = width_E.to(scores_TE.dtype)
    used_E = counts_E / num_tokens * (cost_E / cost_E.mean())
    return num_experts * (used_E * (share_E / num_tokens)).sum()


def router_entropy(scores_TE, here_T=None):
    """Mean entropy of the tokens' probabilities, in nats; 0 if there are no tokens.

    Its gradient is finite also where a probability is 0.

    Args:
        here_T: the tokens to count; None for all.
    """
    logs_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).tiny).log()
    return mean_over(-(scores_TE * logs_TE).sum(dim=1), here_T)


def mean_over(values_T, here_T=None):
    """Mean over the tokens at a gate; 0 if there are none.

    Args:
        here_T: the tokens to count; None for all.
    """
    if here_T is None:
        return values_T.sum() / max(len(values_T), 1)
    return values_T.masked_fill(here_T.logical_not(), 0).sum() / here_T.sum().clamp(min=1)


def balance_loss(scores_TE, first_T, here_T=None):
    """Load balance of one gate: E * sum over e of f_e * p_e (paper, section 3.2).

    f_e is the fraction of tokens whose first choice is e, p_e the mean probability of e. The loss
    is 1 when the load is even, E when one expert takes all tokens, and 0 when there are no tokens.

    Args:
        here_T: the tokens to count; None for all.
    """
    num_tokens, num_experts = scores_TE.shape
    counted_T = torch.ones_like(scores_TE[:, 0]) if here_T is None else here_T.to(scores_TE.dtype)
    num_tokens = max(num_tokens, 1) if here_T is None else counted_T.sum().clamp(min=1)
    counts_E = scores_TE.new_zeros(num_experts).index_add(0, first_T, counted_T)
    share_E = (scores_TE if here_T is None else scores_TE * counted_T.unsqueeze(1)).sum(dim=0)
    return num_experts * (counts_E / num_tokens * (share_E / num_tokens)).sum()
