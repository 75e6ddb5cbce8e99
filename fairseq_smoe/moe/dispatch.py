"""Moving tokens to their experts and back by index.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, C choices of a token
and an expert, N rows: the choices that are not dropped, sorted by expert. No tensor here is larger
than N x D.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Optional

import torch


@dataclass(frozen=True)
class Runs:
    """Rows that are sorted by expert.

    Attributes:
        rows_E: number of rows of each expert.
        num_rows: N, the rows of all experts, and unused rows after those of the last expert if
            shapes are fixed.
    """

    rows_E: torch.Tensor
    num_rows: int

    @cached_property
    def rows_per_expert(self):
        """``rows_E`` as a list; waits for the device."""
        return self.rows_E.tolist()

    @cached_property
    def ends_E(self):
        """Where each expert's rows end, int32."""
        return self.rows_E.cumsum(0).int()

    @cached_property
    def row_expert_N(self):
        """Expert of each row; unused rows get the last expert."""
        rows = torch.arange(self.num_rows, device=self.ends_E.device, dtype=torch.int32)
        return torch.searchsorted(self.ends_E, rows, right=True).clamp(max=len(self.rows_E) - 1)


@dataclass(frozen=True)
class Dispatch(Runs):
    """Which token each expert row holds.

    Attributes:
        row_choice_N: index of the row's choice.
        row_token_N: token of each row.
        kept_C: False where the expert was full; None when there was no limit.
        valid_N: None, unless shapes must not depend on which tokens are at the gate. N is then C,
            and ``valid_N`` is False for the unused rows after those of the last expert.
    """

    row_choice_N: torch.Tensor
    row_token_N: torch.Tensor
    kept_C: Optional[torch.Tensor]
    valid_N: Optional[torch.Tensor]


def plan_dispatch(expert_C, token_C, num_experts, capacity=None, here_T=None):
    """Sort choices by expert and drop those beyond the expert's capacity.

    Each expert takes its choices in the given order, and those beyond the first ``capacity`` are
    dropped. If all first choices come before all second ones, first choices are served first, as in
    GShard.

    Args:
        expert_C, token_C: the choices.
        num_experts: E.
        capacity: rows per expert, a number or a scalar tensor; None for no limit.
        here_T: marks the tokens to dispatch. Shapes then do not depend on their number, and the
            host does not wait for the device. None for all tokens.
    """
    if here_T is not None:
        expert_C = torch.where(here_T[token_C], expert_C, num_experts)  # sorted after all experts
    row_choice_N = torch.argsort(expert_C, stable=True)
    # bincount would wait for the device
    rows_E = expert_C.new_zeros(num_experts + 1).index_add(0, expert_C, torch.ones_like(expert_C))
    kept_C = None
    if capacity is not None:
        start_E = rows_E.cumsum(0) - rows_E
        place = torch.arange(len(expert_C), device=expert_C.device)
        has_room = place - start_E[expert_C[row_choice_N]] < capacity
        kept_C = torch.empty_like(has_room).index_copy(0, row_choice_N, has_room)
        if here_T is None:
            row_choice_N = row_choice_N[has_room]
        else:
            row_choice_N = torch.argsort(torch.where(kept_C, expert_C, num_experts), stable=True)
        rows_E = rows_E.clamp(max=capacity)
    rows_E = rows_E[:num_experts]
    valid_N = None
    if here_T is not None:
        valid_N = torch.arange(len(expert_C), device=expert_C.device) < rows_E.sum()
    row_token_N = token_C[row_choice_N]
    return Dispatch(rows_E, len(row_token_N), row_choice_N, row_token_N, kept_C, valid_N)


def gather_rows(tokens_TD, dispatch):
    """Copy every token to its rows: (T, D) -> (N, D)."""
    return only_valid(tokens_TD.index_select(0, dispatch.row_token_N), dispatch)


def combine_rows(rows_ND, weights_C, dispatch, num_tokens, most=None):
    """Weighted sum of each token's rows (paper, eq. 6): (N, D) -> (T, D).

    With two choices per token, at most two rows are added to zero, so the result does not depend on
    the order of addition. With more choices, rows are added in the order of the experts; but in
    training on a GPU in any order, which is faster.

    Args:
        most: the most choices of a token; None if that is not known.
    """
    weights_N = weights_C[dispatch.row_choice_N].to(rows_ND.dtype)
    weighted_ND = only_valid(rows_ND, dispatch) * weights_N.unsqueeze(1)
    if rows_ND.is_cuda and not torch.is_grad_enabled() and (most is None or most > 2):
        return sum_in_order(weighted_ND, dispatch.row_token_N, num_tokens)
    out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    return out_TD.index_add(0, dispatch.row_token_N, weighted_ND)


def sum_in_order(rows_ND, token_N, num_tokens):
    """The sum of each token's rows, in their order on a GPU as well, where ``index_add`` with
    several rows of a token adds them in any order. The host waits for the device."""
    order_N = token_N.argsort(stable=True)
    counts_T = token_N.new_zeros(num_tokens).index_add(0, token_N, torch.ones_like(token_N))
    first_T = counts_T.cumsum(0) - counts_T
    place_N = torch.arange(len(token_N), device=token_N.device) - first_T[token_N[order_N]]
    out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1])
    for place in range(int(counts_T.max()) if num_tokens else 0):  # one row of a token at a time
        own = order_N[place_N == place]
        out_TD.index_add_(0, token_N[own], rows_ND[own])
    return out_TD


def only_valid(rows_ND, dispatch):
    """Set unused rows, and their gradient, to zero: both may be undefined."""
    if dispatch.valid_N is None:
        return rows_ND
    return rows_ND.masked_fill(dispatch.valid_N.logical_not().unsqueeze(1), 0)
