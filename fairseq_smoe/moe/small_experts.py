"""Products of the small experts that each row has chosen, and of no others (MoEfication).

A small expert is a few hidden units of a feed-forward network with ReLU. The functions here are for
evaluation on a CPU: they make no gradients.

Letters in names: N rows, D model dim, P small experts, W hidden units of each, K small experts that
a row chooses, C = N * K choices.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

FEW_ROWS = 32  # up to this number, unit by unit is faster
ROWS_AT_ONCE = 256  # that are copied and summed together; few enough to stay in the cache
LONGEST_RUN = 512  # rows of one product


@dataclass(frozen=True)
class SmallExperts:
    """The weights of P small experts, without the bias of the second layer.

    Attributes:
        fc1_weight_PWD, fc1_bias_PW, fc2_weight_PWD: contiguous; both weights hold a vector of the
            model's width for every hidden unit.
    """

    fc1_weight_PWD: torch.Tensor
    fc1_bias_PW: torch.Tensor
    fc2_weight_PWD: torch.Tensor

    def of(self, experts):
        """Some of the small experts, a ``range``."""
        if len(experts) == len(self.fc1_bias_PW):
            return self
        own = slice(experts.start, experts.stop)
        return SmallExperts(*(tensor[own] for tensor in vars(self).values()))


def sum_of_chosen(rows_ND, choice_NK, experts):
    """The unweighted sum of the outputs of each row's small experts.

    Args:
        rows_ND: float32 or float64.
        choice_NK: small experts of each row, in any order, none twice.
        experts: :class:`SmallExperts`

    Returns:
        (N, D)
    """
    if not len(rows_ND):
        return torch.zeros_like(rows_ND)
    way = unit_by_unit if len(rows_ND) <= FEW_ROWS else run_by_run
    return way(rows_ND, choice_NK, experts)


def unit_by_unit(rows_ND, choice_NK, experts):
    """For few rows, where reading the weights takes the time. They are read in place and only where
    they are chosen: the first layer is a product of which only some entries are computed, the
    second a weighted sum of chosen vectors."""
    num_rows, dim = rows_ND.shape
    width = experts.fc1_bias_PW.shape[1]
    units_NU = (choice_NK.unsqueeze(2) * width + torch.arange(width)).flatten(1)
    ends = torch.arange(0, units_NU.numel() + 1, units_NU.shape[1])
    bias_1U = experts.fc1_bias_PW.index_select(0, choice_NK.view(-1)).view(-1)
    _quiet_about_sparse_tensors()
    chosen = torch.sparse_csr_tensor(
        *(ends, units_NU.view(-1), bias_1U),
        size=(num_rows, experts.fc1_bias_PW.numel()),
        check_invariants=False,
    )
    fc1_weight_DU = experts.fc1_weight_PWD.view(-1, dim).t()
    hidden_NU = torch.sparse.sampled_addmm(chosen, rows_ND, fc1_weight_DU).values()
    hidden_NU = hidden_NU.relu_().view(units_NU.shape)
    fc2_weight_UD = experts.fc2_weight_PWD.view(-1, dim)
    return F.embedding_bag(units_NU, fc2_weight_UD, per_sample_weights=hidden_NU, mode="sum")


def run_by_run(rows_ND, choice_NK, experts):
    """For many rows, where arithmetic takes the time. Each expert multiplies the rows that have
    chosen it. Short runs of rows are copied together, and their outputs added together, as calls of
    torch cost more than a few rows do."""
    number, _, dim = experts.fc1_weight_PWD.shape
    chosen_PN = torch.zeros(number, len(rows_ND), dtype=torch.bool)
    chosen_PN.scatter_(0, choice_NK.t(), True)
    expert_C, row_C = chosen_PN.nonzero().unbind(1)  # by expert, without sorting
    hidden_CW = experts.fc1_bias_PW.index_select(0, expert_C)
    fc1 = experts.fc1_weight_PWD.transpose(1, 2).unbind(0)
    fc2 = experts.fc2_weight_PWD.unbind(0)
    out_ND = rows_ND.new_zeros(len(rows_ND), dim)
    # one for all copies: the pages of memory that is taken and freed each time come anew
    memory = rows_ND.new_empty(ROWS_AT_ONCE + LONGEST_RUN, dim)
    start = 0
    for pieces in _pieces(chosen_PN.sum(1).tolist()):
        sizes = [size for _, size in pieces]
        stop = start + sum(sizes)
        rows, hidden = row_C[start:stop], hidden_CW[start:stop]
        copied = torch.index_select(rows_ND, 0, rows, out=memory[: len(rows)])
        for (e, _), x, h in zip(pieces, copied.split(sizes), hidden.split(sizes)):
            h.addmm_(x, fc1[e])
        hidden.relu_()
        for (e, _), h, y in zip(pieces, hidden.split(sizes), copied.split(sizes)):
            torch.mm(h, fc2[e], out=y)  # the copied rows are not needed any more
        out_ND.index_add_(0, rows, copied)
        start = stop
    return out_ND


def _pieces(rows_per_expert):
    """Groups of ``(expert, rows)``, in order, that are computed together."""
    group, size = [], 0
    for e, rows in enumerate(rows_per_expert):
        while rows:
            piece = min(rows, LONGEST_RUN)
            group.append((e, piece))
            rows, size = rows - piece, size + piece
            if size >= ROWS_AT_ONCE:
                yield group
                group, size = [], 0
    if group:
        yield group


@cache
def _quiet_about_sparse_tensors():
    """torch says once that these are in beta state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
