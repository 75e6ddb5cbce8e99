"""The stratified mixture-of-experts block: a whole FFN sublayer of a transformer.

Letters in names: T tokens that are not padding, D model dim, E experts a gate sees, C choices of a
token and an expert, L strata.
"""

from dataclasses import dataclass
from functools import partial
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.moe.dispatch import plan_dispatch
from fairseq_smoe.moe.expert_kinds.ffn import BACKENDS, FFNExperts, FFNOptions
from fairseq_smoe.moe.gate import BALANCE_LOSS
from fairseq_smoe.moe.gates.top_k import SECOND_EXPERT_POLICIES, TopKGate, TopKOptions
from fairseq_smoe.moe.selection import select
from fairseq_smoe.moe.strata import visible_experts, visit_probabilities

NORMS = ("paper", "released")


@dataclass(frozen=True)
class GateRecord:
    """What one gate did in one forward pass. No tensor here has a gradient.

    Experts are numbered from the first one that the gate sees.

    Attributes:
        scores_TE: scores of the tokens at this gate.
        best_T: best expert of each token.
        expert_C, token_C: the choices; see :class:`~fairseq_smoe.moe.gate.Choices`.
        kept_C: False where the expert was full; None when there was no limit.
        here_T: True for the tokens that were at this gate; the values of other tokens are
            meaningless. None when all were.
        counts: what the gate has counted; see :class:`~fairseq_smoe.moe.gate.Choices`.
    """

    scores_TE: torch.Tensor
    best_T: torch.Tensor
    expert_C: torch.Tensor
    token_C: torch.Tensor
    kept_C: Optional[torch.Tensor] = None
    here_T: Optional[torch.Tensor] = None
    counts: Optional[torch.Tensor] = None

    @classmethod
    def of(cls, choices, kept_C=None, here_T=None):
        """The record of a gate's :class:`~fairseq_smoe.moe.gate.Choices`."""
        scores_TE, pairs = choices.scores_TE.detach(), (choices.expert_C, choices.token_C)
        return cls(scores_TE, choices.best_T, *pairs, kept_C, here_T, choices.counts)

    @property
    def num_tokens(self):
        """Number of tokens that were at this gate; a scalar tensor if only the device knows it."""
        return len(self.scores_TE) if self.here_T is None else self.here_T.sum()

    @property
    def num_visits(self):
        """Number of choices that an expert computed, a scalar tensor."""
        visited_C = torch.ones_like(self.expert_C, dtype=torch.bool)
        for mask_C in (self.kept_C, self.here_C):
            visited_C = visited_C if mask_C is None else visited_C & mask_C
        return visited_C.sum()

    @property
    def here_C(self):
        """Mask of the choices whose token was at this gate; None for all."""
        return None if self.here_T is None else self.here_T[self.token_C]


@dataclass(frozen=True)
class BlockStats:
    """Routing of one forward pass of a block.

    Attributes:
        losses: ``{name: mean over the gates}``, scalars before weighting; empty for a block with a
            view, and in torch's inference mode, where nothing is trained or validated.
        passes: (...) int64, requested capacity of each token; 0 at padding. If tokens are split into
            heads, (..., heads), that of each head.
        gates: one record per gate, in stratum order.
        loss_weights: ``{name: weight}`` of the losses whose weight the criterion does not choose.
        shared_weight: (T,) weight of the expert branch if a dense FFN runs beside it (CMR).
        heads: number of parts of a token that are routed by themselves.
    """

    losses: Dict[str, torch.Tensor]
    passes: torch.Tensor
    gates: List[GateRecord]
    loss_weights: Dict[str, float]
    shared_weight: Optional[torch.Tensor] = None
    heads: int = 1

    @property
    def balance_loss(self):
        """Mean balance loss of the gates, before the weight alpha."""
        return self.losses[BALANCE_LOSS]


class SMoEBlock(nn.Module):
    """FFN sublayer whose experts are arranged in strata (paper, section 3).

    A token enters at the first stratum. Each pass normalises it and adds the output of its top-k
    experts among those of this and all later strata. The token then moves on to the stratum after
    that of its best expert. It leaves the block when its best expert is in the last stratum. The
    block contains its LayerNorms and the residual connection. With one stratum it is a vanilla MoE
    sublayer; with one stratum and ``top_k=1``, a Switch sublayer.

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
        eom: expert output masking: in training this fraction of expert outputs is zeroed; in
            evaluation all are scaled by ``1 - eom``.
        activation_fn: activation of the experts.
        expert_backend: how the experts multiply: "loop" expert by expert; "grouped_mm" with torch's
            function of that name, without waiting for the device; "auto" with "grouped_mm" if torch
            has a kernel for it, else with "loop".
        expert_group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` of the ranks over which
            the experts are sharded. Each rank calls the block with its own tokens; the capacity for
            them does not depend on the tokens of other ranks. None if this process holds all
            experts.
        make_gate: ``make_gate(embed_dim, num_experts)`` returns a
            :class:`~fairseq_smoe.moe.gate.Gate`; None for a
            :class:`~fairseq_smoe.moe.gates.top_k.TopKGate` with ``top_k``, ``capacity_factor`` and
            ``second_expert_policy``.
        make_experts: ``make_experts(strata, embed_dim, ffn_dim, activation_fn=...,
            activation_dropout=..., group=...)`` returns
            :class:`~fairseq_smoe.moe.experts.Experts`; None for
            :class:`~fairseq_smoe.moe.expert_kinds.ffn.FFNExperts` with ``expert_backend``.
        alive: experts of each stratum that are alive at the start, if the gates can add others up
            to ``strata``; None for all.
        pass_scale: initial values of trained factors of the outputs of the passes, one number for
            each stratum (ReZero, arXiv 2003.04887). With 0 a pass begins as the identity. None for
            no such factors.
        pass_curriculum: in training, the chance of a token to go on to another pass rises from 0 to
            1 over this many updates; others leave the block, whatever their best expert. 0 for no
            such beginning. :meth:`set_num_updates` tells the block how far the training is.

    Attributes:
        view: how the next inputs are routed, a :class:`~fairseq_smoe.moe.single_expert.View`; None
            for what the gates decide. Set by :func:`~fairseq_smoe.moe.single_expert.viewed`.
    """

    view = None

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
        make_gate=None,
        make_experts=None,
        alive=None,
        pass_scale=None,
        pass_curriculum=0,
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
        if expert_backend not in BACKENDS:
            raise ValueError(f"expert_backend={expert_backend!r}: expected one of {BACKENDS}")
        if pass_scale is not None and len(pass_scale) != len(strata):
            raise ValueError(f"pass_scale={pass_scale!r}: expected {len(strata)} numbers, or None")
        if pass_curriculum < 0:
            raise ValueError(f"pass_curriculum={pass_curriculum!r}: expected 0 (none) or more")
        if make_gate is None:
            make_gate = partial(
                TopKGate,
                options=TopKOptions(top_k == 1, second_expert_policy, capacity_factor or 0),
            )
        if make_experts is None:
            make_experts = partial(FFNExperts, options=FFNOptions(expert_backend))
        self.strata = tuple(strata)
        self.norm = norm
        self.dropout = dropout
        self.eom = eom
        self.pass_curriculum = pass_curriculum
        self.set_num_updates(0)
        self.visible = self._visible_experts()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(self._num_norms()))
        scale_L = None if pass_scale is None else torch.tensor(pass_scale, dtype=torch.float)
        self.register_parameter("pass_scale", None if scale_L is None else nn.Parameter(scale_L))
        self.gates = nn.ModuleList(make_gate(embed_dim, len(experts)) for experts in self.visible)
        stratum_of = [i for i, size in enumerate(strata) for _ in range(size)]
        for i, gate in enumerate(self.gates):
            seen = slice(i, stratum_of[self.visible[i][-1]] + 1)
            gate.stratum = i
            gate.enter(self.strata[seen], tuple(alive or strata)[seen])
        self.experts = make_experts(
            self.strata,
            embed_dim,
            ffn_dim,
            activation_fn=activation_fn,
            activation_dropout=activation_dropout,
            group=expert_group,
        )
        for i, experts in enumerate(self.visible if expert_group else ()):
            order_E = expert_group.sending_order(experts)
            self.register_buffer(f"sending_order_{i}", order_E, persistent=False)
        self.register_buffer("stratum_of_expert", torch.tensor(stratum_of), persistent=False)

    def set_num_updates(self, updates):
        """Say how many updates the training has made. fairseq does before every update."""
        self.going_on = min(1, updates / self.pass_curriculum) if self.pass_curriculum else 1

    def expected_visits(self):
        """Tokens at each gate per token that enters the block, under uniform gates; they add up to
        the mean requested capacity (paper, section 4.4)."""
        return visit_probabilities(self.num_alive())

    def expected_choices(self):
        """Experts that a token visits at each gate, under uniform gates."""
        return [gate.expected_choices() for gate in self.gates]

    def num_alive(self):
        """Experts of each stratum that are alive."""
        return [gate.num_alive()[0] for gate in self.gates]

    def _visible_experts(self):
        return visible_experts(self.strata)

    def _num_norms(self):
        return len(self.strata) + (self.norm == "released")

    def extra_repr(self):
        return f"strata={self.strata}, norm={self.norm}, eom={self.eom}"

    def forward(self, x, padding_mask=None):
        """Pass the tokens through the strata.

        Args:
            x: (..., D). Experts fill up in the order of the flattened leading dimensions.
            padding_mask: (...) bool, True at padding. Padding is never routed; it comes out
                unchanged (norm="released": through the exit norm).

        Returns:
            ``(y, stats)``: (..., D) and :class:`BlockStats`.
        """
        flat_TD = x.reshape(-1, x.shape[-1])
        real_T = None if padding_mask is None else padding_mask.reshape(-1).logical_not()
        key_T = None if self.view is None else self.view.keys_of(x.shape[:-1])
        y_TD, passes_T, gates, losses = self._run(flat_TD, real_T, key_T)
        if self.norm == "released":
            y_TD = self.norms[-1](y_TD)
        passes = passes_T.view(x.shape[:-1])
        losses = self._mean_losses(losses, gates)
        loss_weights = {**self.gates[0].loss_weights, **self.experts.loss_weights}
        return y_TD.view_as(x), BlockStats(losses, passes, gates, loss_weights)

    def _run(self, tokens_TD, real_T, key_T=None):
        """All passes. Returns the new tokens, and passes, gate records and losses of each gate.

        Args:
            key_T: of the :attr:`view`, if there is one.
        """
        shared = self.experts.share(tokens_TD.dtype)
        gates, losses = [], []
        behind_all = self.stratum_of_expert.new_full((len(tokens_TD),), len(self.strata))
        stratum_T, passes_T = behind_all, torch.zeros_like(behind_all)
        for i, visible in enumerate(self.visible):
            at_gate_T = stratum_T == i if i else real_T
            here = select(tokens_TD, at_gate_T, may_wait=shared.waits)
            x_HD = here.take(tokens_TD)
            normed_HD = self.norms[i](x_HD)
            key_H = None if key_T is None else here.take(key_T)
            y_HD, record, own_losses = self._visit(normed_HD, i, shared, here.mask_H, key_H)
            residual_HD = normed_HD if self.norm == "released" and i else x_HD  # eq. 7
            out_HD = residual_HD + F.dropout(y_HD, self.dropout, self.training)
            tokens_TD = here.put(tokens_TD, out_HD)
            stratum_T = here.put(stratum_T, self._next_stratum(record.best_T + visible.start))
            passes_T = here.put(passes_T, here.take(passes_T) + 1)
            gates.append(record)
            losses.append(own_losses)
        return tokens_TD, passes_T, gates, losses

    def places(self, stats):
        """Which tokens were at each gate in a forward pass in evaluation, without padding.

        Args:
            stats: the :class:`BlockStats` of the pass.

        Returns:
            for each gate a list of indices of tokens, in the order in which its record has them if
            it has no ``here_T``.
        """
        stratum_T = torch.zeros(stats.passes.numel(), dtype=torch.long)
        found = []
        for i, (record, visible) in enumerate(zip(stats.gates, self.visible)):
            here_H = (stratum_T == i).nonzero().squeeze(1)
            best_T = record.best_T.cpu()
            best_H = best_T if record.here_T is None else best_T[here_H]
            stratum_T[here_H] = self.stratum_of_expert.cpu()[best_H + visible.start] + 1
            found.append(here_H.tolist())
        return found

    def _next_stratum(self, best_T):
        """The stratum that each token goes to; behind the last one, it leaves the block."""
        next_T = self.stratum_of_expert[best_T] + 1
        if self.training and self.going_on < 1:
            leaves_T = torch.rand(next_T.shape, device=next_T.device) >= self.going_on
            next_T = next_T.masked_fill(leaves_T, len(self.strata))
        return next_T

    def _visit(self, normed_TD, i, shared, here_T=None, key_T=None):
        """One gate and its experts (eq. 5 and 6). Returns the output before the residual, the
        gate's record and its losses."""
        visible, gate = self.visible[i], self.gates[i]
        choices = gate(normed_TD, here_T)
        if key_T is not None:
            choices, weights_C = self.view.route(gate, normed_TD, choices, key_T)
        capacity = None
        if self.training:
            capacity = gate.capacity(len(normed_TD) if here_T is None else here_T.sum())
        rows_C = choices.expert_C  # rows are sorted by expert
        if self.experts.exchanges:
            rows_C = getattr(self, f"sending_order_{i}")[rows_C]
        plan = plan_dispatch(rows_C, choices.token_C, len(visible), capacity, here_T)
        if key_T is None:
            weights_C = gate.weights(choices, plan.kept_C)
        weights_C = self._mask_outputs(weights_C)
        y_TD = self.experts.visit(normed_TD, choices, plan, weights_C, shared, visible, here_T)
        if self.pass_scale is not None:
            y_TD = y_TD * self.pass_scale[i]
        record = GateRecord.of(choices, plan.kept_C, here_T)
        # of tokens that the gate has not routed, losses mean nothing
        if key_T is not None or torch.is_inference_mode_enabled():
            return y_TD, record, {}
        losses = gate.losses(choices, here_T) | self.experts.losses(choices, visible, here_T)
        return y_TD, record, losses

    def _mask_outputs(self, weights_C):
        """Expert output masking: masks the whole output of an expert for a token."""
        if not self.eom:
            return weights_C
        if not self.training:
            return weights_C * (1 - self.eom)
        return weights_C * (torch.rand_like(weights_C) >= self.eom)

    def _mean_losses(self, losses, gates):
        seen = len(losses)
        if self.norm == "released":
            seen = sum((torch.as_tensor(gate.num_tokens) > 0).long() for gate in gates).clamp(min=1)
        return {name: torch.stack([own[name] for own in losses]).sum() / seen for name in losses[0]}
