"""Moving tokens to their experts and back by index.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, K choices per token,
N rows (token-choice pairs that found room), sorted by expert. No tensor here is larger than N x D.
"""

from dataclasses import dataclass
from typing import List, Optional

import torch


@dataclass(frozen=True)
class Dispatch:
    """Which token each expert row holds.

    Attributes:
        row_choice_N: index of the row's choice in the flattened (K, T) table.
        row_token_N: token of each row.
        rows_per_expert: length E, sums to N.
        kept_KT: False where the expert was full; None when there was no limit.
    """

    row_choice_N: torch.Tensor
    row_token_N: torch.Tensor
    rows_per_expert: List[int]
    kept_KT: Optional[torch.Tensor]


def plan_dispatch(experts_KT, num_experts, capacity=None):
    """Sort token-choice pairs by expert and drop those beyond its capacity.

    The queue of an expert holds all first choices in token order, then the second choices in token
    order; who stands behind the first ``capacity`` places is dropped. A dropped first choice keeps
    its place in front of the second ones, as in GShard.

    Args:
        experts_KT: chosen experts.
        num_experts: E.
        capacity: rows per expert; None for no limit.
    """
    num_tokens = experts_KT.shape[1]
    chosen = experts_KT.reshape(-1)  # first choices come first, which the stable sort preserves
    row_choice_N = torch.argsort(chosen, stable=True)
    counts_E = torch.bincount(chosen, minlength=num_experts)
    kept_KT = None
    if capacity is not None:
        start_E = counts_E.cumsum(0) - counts_E
        place = torch.arange(len(chosen), device=chosen.device) - start_E[chosen[row_choice_N]]
        has_room = place < capacity
        kept_KT = torch.empty_like(chosen, dtype=torch.bool)
        kept_KT[row_choice_N] = has_room
        kept_KT = kept_KT.view_as(experts_KT)
        row_choice_N = row_choice_N[has_room]
        counts_E = counts_E.clamp(max=capacity)
    return Dispatch(
        row_choice_N, row_choice_N % max(num_tokens, 1), counts_E.tolist(), kept_KT
    )


def gather_rows(tokens_TD, dispatch):
    """Copy every token to its rows: (T, D) -> (N, D)."""
    return tokens_TD.index_select(0, dispatch.row_token_N)


def combine_rows(rows_ND, weights_KT, dispatch):
    """Weighted sum of each token's rows (paper, eq. 6): (N, D) -> (T, D).

    A token adds at most two rows to zero, so the result does not depend on the order of addition.
    """
    weights_N = weights_KT.reshape(-1)[dispatch.row_choice_N].to(rows_ND.dtype)
    out_TD = rows_ND.new_zeros(weights_KT.shape[1], rows_ND.shape[1])
    return out_TD.index_add(0, dispatch.row_token_N, rows_ND * weights_N.unsqueeze(1))
