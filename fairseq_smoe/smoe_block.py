"""The stratified mixture-of-experts block: a whole FFN sublayer of a transformer.

Letters in names: T tokens that are not padding, D model dim, E experts a gate sees, K choices.
"""

from dataclasses import dataclass
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.dispatch import combine_rows, gather_rows, plan_dispatch
from fairseq_smoe.experts import Experts
from fairseq_smoe.routing import (
    balance_loss,
    choose_experts,
    combine_weights,
    expert_capacity,
    gate_logits,
)
from fairseq_smoe.selection import select
from fairseq_smoe.strata import visible_experts

NORMS = ("paper", "released")
SECOND_EXPERT_POLICIES = ("all", "sampling")


@dataclass(frozen=True)
class GateRecord:
    """What one gate did in one forward pass; nothing here carries a gradient.

    Attributes:
        scores_TE: gate probabilities of the tokens at this gate.
        experts_KT: their choices, counted from the first expert the gate sees.
        kept_KT: False where the expert was full; None when there was no limit.
        here_T: the tokens that stood at this gate; the numbers of others mean nothing. None when
            all did.
    """

    scores_TE: torch.Tensor
    experts_KT: torch.Tensor
    kept_KT: Optional[torch.Tensor]
    here_T: Optional[torch.Tensor] = None

    @property
    def num_tokens(self):
        """Tokens that stood at this gate; a scalar tensor where the device alone knows."""
        return len(self.scores_TE) if self.here_T is None else self.here_T.sum()


@dataclass(frozen=True)
class BlockStats:
    """Routing of one forward pass of a block.

    Attributes:
        balance_loss: mean balance loss of the gates, a scalar before the weight alpha.
        passes: (...) int64, requested capacity of each token; 0 at padding.
        gates: one record per gate, in stratum order.
        shared_weight: (T,) weight of the expert branch where a dense FFN runs beside it (CMR).
    """

    balance_loss: torch.Tensor
    passes: torch.Tensor
    gates: List[GateRecord]
    shared_weight: Optional[torch.Tensor] = None


class SMoEBlock(nn.Module):
    """FFN sublayer whose experts stand in strata (paper, section 3).

    A token enters at the first stratum. Each pass normalises it, adds the output of its top-k
    experts among those of this and all later strata, and sends it behind the stratum that holds
    its best expert; it leaves after a pass whose best expert stands in the last stratum. The block
    owns its LayerNorms and the residual connection. With one stratum it is a vanilla MoE sublayer;
    with ``top_k=1`` as well, a Switch sublayer.

    Args:
        embed_dim: D.
        ffn_dim: hidden size of every expert.
        strata: experts of each stratum.
        top_k: 2, or 1 for Switch.
        capacity_factor: in training an expert takes at most ``capacity_factor * ceil(T_i / E_i)``
            rows of the T_i tokens at a gate that sees E_i experts; None for no limit. Evaluation
            never drops.
        second_expert_policy: "all" takes the second-highest probability; "sampling" draws the
            second expert in training (evaluation stays deterministic).
        norm: "paper" for eq. 4-7; "released" for what the authors' code computes: the residual of
            the second and later passes is the normalised input, one more LayerNorm follows the
            last stratum, and the balance loss averages over gates that saw tokens.
        dropout: on the output of every pass.
        activation_dropout: on the hidden units of the experts.
        eom: expert output masking: in training this fraction of expert outputs is zeroed, at
            evaluation all are scaled by ``1 - eom``.
        activation_fn: activation of the experts.
        expert_backend: see :class:`~fairseq_smoe.experts.Experts`.
        expert_group: :class:`~fairseq_smoe.expert_group.ExpertGroup` of processes that share the
            experts; each calls the block with tokens of its own, which have the capacity that they
            would have alone. None for a process that holds all experts.
    """

    def __init__(
        self,
        embed_dim,
        ffn_dim,
        strata=(4, 4),
        top_k=2,
        capacity_factor=2.0,
        second_expert_policy="all",
        norm="paper",
        dropout=0.0,
        activation_dropout=0.0,
        eom=0.0,
        activation_fn=F.relu,
        expert_backend="auto",
        expert_group=None,
    ):
        super().__init__()
        if not strata or min(strata) < 1:
            raise ValueError(f"strata={strata!r}: expected one positive size per stratum")
        if top_k not in (1, 2):
            raise ValueError(f"top_k={top_k!r}: expected 1 or 2")
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: expected one of {NORMS}")
        if second_expert_policy not in SECOND_EXPERT_POLICIES:
            raise ValueError(
                f"second_expert_policy={second_expert_policy!r}: "
                f"expected one of {SECOND_EXPERT_POLICIES}"
            )
        if not 0 <= eom < 1:
            raise ValueError(f"eom={eom!r}: expected a fraction from 0 up to, but not, 1")
        self.strata = tuple(strata)
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.sample_second = second_expert_policy == "sampling"
        self.norm = norm
        self.dropout = dropout
        self.eom = eom
        self.visible = self._visible_experts()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(self._num_norms()))
        self.gates = nn.ModuleList(
            nn.Linear(embed_dim, len(experts), bias=False) for experts in self.visible
        )
        self.experts = Experts(
            sum(strata),
            embed_dim,
            ffn_dim,
            activation_fn,
            activation_dropout,
            expert_backend,
            expert_group,
        )
        for i, experts in enumerate(self.visible if expert_group else ()):
            order_E = expert_group.sending_order(experts)
            self.register_buffer(f"sending_order_{i}", order_E, persistent=False)
        stratum_E = torch.tensor([i for i, size in enumerate(strata) for _ in range(size)])
        self.register_buffer("stratum_of_expert", stratum_E, persistent=False)

    def _visible_experts(self):
        return visible_experts(self.strata)

    def _num_norms(self):
        return len(self.strata) + (self.norm == "released")

    def extra_repr(self):
        return f"strata={self.strata}, top_k={self.top_k}, norm={self.norm}, eom={self.eom}"

    def forward(self, x, padding_mask=None):
        """Pass the tokens through the strata.

        Args:
            x: (..., D). Capacity is given out in the order of the flattened leading dimensions.
            padding_mask: (...) bool, True at padding. Padding is never routed; it comes out
                unchanged (norm="released": through the exit norm).

        Returns:
            ``(y, stats)``: (..., D) and :class:`BlockStats`.
        """
        flat_TD = x.reshape(-1, x.shape[-1])
        real_T = None if padding_mask is None else padding_mask.reshape(-1).logical_not()
        y_TD, passes_T, gates, losses = self._run(flat_TD, real_T)
        if self.norm == "released":
            y_TD = self.norms[-1](y_TD)
        stats = BlockStats(self._mean_balance(losses, gates), passes_T.view(x.shape[:-1]), gates)
        return y_TD.view_as(x), stats

    def _run(self, tokens_TD, real_T):
        """All passes: new tokens, passes, gate records, balance losses."""
        shared = self.experts.share(tokens_TD.dtype)
        gates, losses = [], []
        behind_all = self.stratum_of_expert.new_full((len(tokens_TD),), len(self.strata))
        stratum_T, passes_T = behind_all, torch.zeros_like(behind_all)
        for i, visible in enumerate(self.visible):
            at_gate_T = stratum_T == i if i else real_T
            here = select(tokens_TD, at_gate_T, may_wait=shared.waits)
            x_HD = here.take(tokens_TD)
            normed_HD = self.norms[i](x_HD)
            y_HD, record, loss = self._visit(normed_HD, i, shared, here.mask_H)
            residual_HD = normed_HD if self.norm == "released" and i else x_HD  # eq. 7
            out_HD = residual_HD + F.dropout(y_HD, self.dropout, self.training)
            tokens_TD = here.put(tokens_TD, out_HD)
            best_H = record.experts_KT[0] + visible.start
            stratum_T = here.put(stratum_T, self.stratum_of_expert[best_H] + 1)
            passes_T = here.put(passes_T, here.take(passes_T) + 1)
            gates.append(record)
            losses.append(loss)
        return tokens_TD, passes_T, gates, losses

    def _visit(self, normed_TD, i, shared, here_T=None):
        """One gate and its experts (eq. 5 and 6): output before the residual, record, balance loss."""
        visible = self.visible[i]
        logits_TE = gate_logits(normed_TD, self.gates[i].weight)
        scores_TE = logits_TE.softmax(dim=1)
        experts_KT = choose_experts(logits_TE, self.top_k, self.sample_second and self.training)
        capacity = None
        if self.training and self.capacity_factor is not None:
            num_tokens = len(normed_TD) if here_T is None else here_T.sum()
            capacity = expert_capacity(num_tokens, len(visible), self.capacity_factor)
        rows_KT = experts_KT  # rows stand in the order of experts
        if self.experts.exchanges:
            rows_KT = getattr(self, f"sending_order_{i}")[experts_KT]
        plan = plan_dispatch(rows_KT, len(visible), capacity, here_T)
        weights_KT = self._mask_outputs(combine_weights(scores_TE, experts_KT, plan.kept_KT))
        rows_ND = self.experts(gather_rows(normed_TD, plan), plan, shared, visible)
        record = GateRecord(scores_TE.detach(), experts_KT, plan.kept_KT, here_T)
        loss = balance_loss(scores_TE, experts_KT[0], here_T)
        return combine_rows(rows_ND, weights_KT, plan), record, loss

    def _mask_outputs(self, weights_KT):
        """Expert output masking: an expert's output for a token is dropped as a whole."""
        if not self.eom:
            return weights_KT
        if not self.training:
            return weights_KT * (1 - self.eom)
        return weights_KT * (torch.rand_like(weights_KT) >= self.eom)

    def _mean_balance(self, losses, gates):
        seen = len(losses)
        if self.norm == "released":
            seen = sum((torch.as_tensor(gate.num_tokens) > 0).long() for gate in gates).clamp(min=1)
        return torch.stack(losses).sum() / seen
