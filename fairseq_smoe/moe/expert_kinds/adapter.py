"""Experts that are adapters behind one FFN that all of them share (PESC).

Wu et al. 2024, arXiv 2401.02731. Letters in names: T tokens at the gate, D model dim, A hidden dim
of an adapter, M tokens that pass the FFN.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.dispatch import (
    Runs,
    combine_rows,
    gather_rows,
    only_valid,
    plan_dispatch,
)
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts, FFNOptions, SharedExperts, two_layers
from fairseq_smoe.moe.grouped_linear import ALIGNMENT
from fairseq_smoe.moe.kind import option
from fairseq_smoe.moe.shared_weight import SharedWeight

FREEZE = ("none", "ffn", "backbone")
MULTIPLE = ALIGNMENT // 2  # numbers of half precision


@dataclass
class AdapterOptions(FFNOptions):
    pesc_adapter_dim: int = option(
        0,
        "with --moe-experts adapter: hidden units of an adapter; 0 for half of the model's width",
    )
    pesc_freeze: str = option(
        "none",
        "parameters that keep their values: those of the shared 'ffn', or of the 'backbone': all "
        "that a dense model has as well. Gates and adapters are always trained",
    )
    pesc_dropout: float = option(0.0, "dropout on the input of the adapters")
    pesc_scale: float = option(1.0, "factor of the adapters' output")

    def check(self, strata, options):
        if getattr(options, "moe_experts", None) != AdapterExperts.name:
            return self.refuse_given(options.moe_experts, "--moe-experts adapter")
        super().check(strata, options)
        if self.pesc_adapter_dim < 0:
            raise OptionError(
                f"--pesc-adapter-dim {self.pesc_adapter_dim}: expected 1 or more, or 0 for half of "
                "the model's width"
            )
        if self.moe_expert_backend == "grouped_mm" and self.pesc_adapter_dim % MULTIPLE:
            raise OptionError(
                f"--pesc-adapter-dim {self.pesc_adapter_dim} with --moe-expert-backend grouped_mm: "
                f"expected a multiple of {MULTIPLE}, or another backend"
            )
        if self.pesc_freeze not in FREEZE:
            raise OptionError(f"--pesc-freeze {self.pesc_freeze}: expected {' or '.join(FREEZE)}")
        if not 0 <= self.pesc_dropout < 1:
            raise OptionError(
                f"--pesc-dropout {self.pesc_dropout}: expected a fraction from 0 up to, but not, 1"
            )
        arrangements = (getattr(options, "moe_arrangement", None) or "").split(",")
        if getattr(options, "smoe_stacking", False) or "stacking" in arrangements:
            raise OptionError(
                "--smoe-stacking with --moe-experts adapter: stacked layers have no residual "
                "between them, and adapters without the FFN start as zero; drop --smoe-stacking"
            )


class AdapterExperts(FFNExperts):
    """An FFN that all experts share, with a small adapter for each expert.

    An adapter is a linear layer to few hidden units, the activation, and a linear layer back,
    without biases; the latter starts as zero. The adapters of the last stratum read the output of
    the FFN, u = FFN(h) of the normalised token h, and those of earlier strata read h. A pass
    returns the sum of the adapters' outputs, weighted by the gate. In the pass in which a token
    leaves the block, as its best expert is in the last stratum, u is added with weight 1. So a
    token gets the FFN's output once, whatever the gates do. As long as the adapters' outputs are
    zero, the block is therefore the dense sublayer x + FFN(LN(x)). In one stratum, with weights
    that sum to 1, this is the paper's equation.

    The FFN is computed once for each token that leaves or has a row in the last stratum, on the
    rank that has the token. It has no capacity: a token whose expert was full has the FFN's output.

    Parameters: ``down_weight`` (E, D, A) and ``up_weight`` (E, A, D), stacked over experts in
    stratum order. The module ``ffn`` has ``fc1`` and ``fc2``, as a layer of fairseq's transformer.
    """

    name = "adapter"
    Options = AdapterOptions

    def make_parameters(self):
        dim = self.adapter_dim = self.options.pesc_adapter_dim or max(self.embed_dim // 2, 1)
        bound = 1 / math.sqrt(self.embed_dim)  # as in nn.Linear
        number = sum(self.strata)
        down = torch.empty(number, self.embed_dim, dim).uniform_(-bound, bound)
        self.add_stacked("down_weight", down)
        self.add_stacked("up_weight", torch.zeros(number, dim, self.embed_dim))
        self.ffn = nn.Module()
        self.ffn.fc1 = nn.Linear(self.embed_dim, self.ffn_dim)
        self.ffn.fc2 = nn.Linear(self.ffn_dim, self.embed_dim)
        self.ffn.requires_grad_(self.options.pesc_freeze == "none")

    @property
    def trains_backbone(self):
        return self.options.pesc_freeze != "backbone"

    def weights(self, dtype):
        down, up = (parameter.to(dtype) for parameter in self.stacked())
        none = down.new_zeros(len(down), 1)  # biases
        return down, none.expand(-1, self.adapter_dim), up, none.expand(-1, self.embed_dim)

    def share(self, dtype):
        """:class:`SharedAdapters`"""
        adapters = super().share(dtype)
        dtype = adapters.fc1.weight_EIO.dtype
        # as weights and biases of a single expert
        layers = [
            (layer.weight.to(dtype).t().unsqueeze(0), layer.bias.to(dtype).unsqueeze(0))
            for layer in (self.ffn.fc1, self.ffn.fc2)
        ]
        grouped = adapters.grouped and self.multiplies_in_groups(layers[0][0])
        ffn = SharedExperts(*(SharedWeight(*layer) for layer in layers), grouped, adapters.waits)
        return SharedAdapters(**vars(adapters), ffn=ffn)

    def multiply(self, rows_ND, runs, shared, experts):
        rows_ND = F.dropout(rows_ND, self.options.pesc_dropout, self.training)
        return two_layers(rows_ND, runs, shared, experts, self.activation_fn)

    def visit(self, tokens_TD, choices, plan, weights_C, shared, visible, here_T=None):
        weights_C = weights_C * self.options.pesc_scale
        first = sum(self.strata[:-1]) - visible.start  # of the last stratum
        if first <= 0 and here_T is None:  # all tokens leave
            after_TD = self._ffn(tokens_TD, _all_in_one(tokens_TD), shared)
            y_TD = super().visit(after_TD, choices, plan, weights_C, shared, visible)
            return y_TD.add_(after_TD)
        leaves_T = choices.best_T >= first
        last_N = choices.expert_C[plan.row_choice_N] >= first
        if here_T is not None:
            leaves_T, last_N = leaves_T & here_T, last_N & plan.valid_N
        needs_T = leaves_T.long().index_add(0, plan.row_token_N, last_N.long()) > 0
        after_MD, token_M = self._after_ffn(tokens_TD, needs_T, shared)
        # rows of early strata are copied from the tokens, others from what the FFN has returned
        rows = torch.arange(len(token_M), device=token_M.device)
        place_T = torch.zeros_like(choices.best_T).index_copy(0, token_M, rows)
        from_N = len(tokens_TD) + place_T[plan.row_token_N]
        from_N = torch.where(last_N, from_N, plan.row_token_N)
        both = torch.cat([tokens_TD.to(after_MD.dtype), after_MD])
        rows_ND = self(gather_rows(both, replace(plan, row_token_N=from_N)), plan, shared, visible)
        y_TD = combine_rows(rows_ND, weights_C, plan, len(tokens_TD), choices.most)
        stays_M = leaves_T.logical_not()[token_M]
        return y_TD.index_add_(0, token_M, after_MD.masked_fill(stays_M.unsqueeze(1), 0))

    def _after_ffn(self, tokens_TD, needs_T, shared):
        """The output of the FFN (M, D) for the tokens that ``needs_T`` marks, and which these are
        (M,). If the host cannot know how many, M is T, and the other tokens come last, with 0."""
        token_M = torch.arange(len(tokens_TD), device=tokens_TD.device)
        if shared.waits:
            token_M, needs_T = needs_T.nonzero().squeeze(1), None
        plan = plan_dispatch(torch.zeros_like(token_M), token_M, 1, here_T=needs_T)
        after_MD = self._ffn(gather_rows(tokens_TD, plan), plan, shared)
        return only_valid(after_MD, plan), plan.row_token_N

    def _ffn(self, rows_MD, runs, shared):
        drops = self.training and self.activation_dropout
        activate = self._activate_and_drop if drops else self.activation_fn
        return two_layers(rows_MD, runs, shared.ffn, range(1), activate)

    def params_used(self, visible, choices):
        of_adapters = choices * 2 * self.embed_dim * self.adapter_dim
        of_ffn = 2 * self.embed_dim * self.ffn_dim + self.embed_dim + self.ffn_dim
        return of_adapters + self._share_after_ffn(visible, choices) * of_ffn

    def hidden_dim(self):
        return self.adapter_dim

    def token_hidden_dim(self, visible, choices):
        # where only some tokens pass the FFN, these are copied, and so is its output
        copied = 2 * self.embed_dim if len(visible) > self.strata[-1] else 0
        return self._share_after_ffn(visible, choices) * (self.ffn_dim + copied)

    def _share_after_ffn(self, visible, choices):
        """Probability that at least one of a number of experts drawn from ``visible`` is in the
        last stratum. A token without choices has a best expert as well."""
        choices = max(choices, 1)
        early = len(visible) - min(self.strata[-1], len(visible))
        whole = int(choices)

        def none_of(number):
            return math.comb(early, number) / math.comb(len(visible), number)

        missed = none_of(whole)
        if choices > whole:  # a mean number
            missed += (choices - whole) * (none_of(whole + 1) - missed)
        return 1 - missed


def _all_in_one(rows_MD):
    """:class:`Runs` of rows that all belong to one expert."""
    return Runs(torch.full((1,), len(rows_MD), device=rows_MD.device), len(rows_MD))


@dataclass(frozen=True)
class SharedAdapters(SharedExperts):
    """The weights of the adapters, as those of other experts, and of the FFN.

    Attributes:
        ffn: :class:`~fairseq_smoe.moe.expert_kinds.ffn.SharedExperts` with a single expert.
    """

    ffn: SharedExperts
