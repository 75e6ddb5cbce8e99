"""The gate of DynMoE: a token visits any number of experts, and experts come and go.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, C choices of a token
and an expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.gate import BALANCE_LOSS, Choices, Gate
from fairseq_smoe.moe.gates.top_k import refuse_top_k_options
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.pool import change_experts
from fairseq_smoe.moe.routing import gate_logits, mean_over
from fairseq_smoe.moe.strata import format_strata

_FRACTION = 1 << 24  # sums of tokens are counted in multiples of 1 / this
_EPS = 1e-12


@dataclass
class TopAnyOptions(KindOptions):
    moe_max_experts: int = option(
        0,
        "with --moe-gate top-any: most experts that a stratum can have. It has those of "
        "--smoe-strata at the start, and room for the others (0: no more than at the start)",
    )
    dyn_update_interval: int = option(
        300,
        "with --moe-gate top-any: after every so many updates, experts that no token visits go, "
        "and one comes into each stratum that has room and where tokens visit no expert (0: never)",
    )
    dyn_record_interval: int = option(
        100,
        "with --moe-gate top-any: updates before such a change in which visits are counted",
    )
    dyn_aux: float = option(
        0.01,
        "with --moe-gate top-any: weight of gate_diversity, how far the experts' gate vectors are "
        "from being orthogonal, and of gate_simplicity, their mean length",
    )
    dyn_load_balance: float = option(
        0.0, "with --moe-gate top-any: weight of the balance loss, in place of --moe-gate-loss-wt"
    )
    dyn_efficiency: float = option(
        0.0,
        "with --moe-gate top-any: weight of gate_efficiency, the share of the experts that a token "
        "visits",
    )

    def check(self, strata, options):
        if options.moe_gate != TopAnyGate.name:
            return self.refuse_given(options.moe_gate, "--moe-gate top-any")
        if getattr(options, "moe_gate_bias", False):
            raise OptionError(
                "--moe-gate-bias with --moe-gate top-any: this gate has thresholds instead; drop "
                "--moe-gate-bias"
            )
        if self.moe_max_experts and self.moe_max_experts < max(strata):
            raise OptionError(
                f"--moe-max-experts {self.moe_max_experts}: expected at least {max(strata)}, as "
                f"--smoe-strata {format_strata(strata)} has so many experts in a stratum, or 0"
            )
        if self.dyn_update_interval < 0:
            raise OptionError(
                f"--dyn-update-interval {self.dyn_update_interval}: expected 0 (never) or more"
            )
        if self.dyn_update_interval and not (
            1 <= self.dyn_record_interval <= self.dyn_update_interval
        ):
            raise OptionError(
                f"--dyn-record-interval {self.dyn_record_interval}: expected 1 or more, up to "
                f"--dyn-update-interval {self.dyn_update_interval}"
            )
        for name in ("dyn_aux", "dyn_load_balance", "dyn_efficiency"):
            if getattr(self, name) < 0:
                flag = f"--{name.replace('_', '-')}"
                raise OptionError(f"{flag} {getattr(self, name)}: expected 0 or more")
        refuse_top_k_options(
            options,
            TopAnyGate.name,
            "the gate decides how many experts a token visits; leave it out",
        )


class TopAnyGate(Gate):
    """Every token visits all experts that it is similar enough to (DynMoE, arXiv 2405.14297).

    The similarity of a token x to an expert is the cosine of x and the expert's vector w. The
    expert is active for the token if ``sigmoid(cos(x, w)) > sigmoid(G)``, with a trained threshold
    G. The output is the plain mean over the active experts; the one with the greatest margin,
    ``sigmoid(cos(x, w)) - sigmoid(G)``, is the best. If no expert is active, the token visits none
    in training, keeps its value, and moves on to the next stratum. In evaluation it visits the best
    one, with weight 1.

    An activation a is 0 or 1; in either case its gradient is passed on to the margin as it is
    (straight-through). The output is the sum of ``a / k * expert(x)``, with the number k of active
    experts as a constant. Experts compute nothing for a token that does not visit them, and their
    output counts as 0 there. So the translation loss reaches the activations that are 1, while the
    balance loss and ``gate_efficiency`` reach all.

    Attributes:
        weight: (E, D) parameter, vectors of the experts.
        threshold: (E,) parameter G.
        alive_E: (E,) bool buffer: the experts that exist. The others are only room for new ones.
        counts: (1 + E + D,) int64 buffer: what has been counted since the experts last changed.
    """

    name = "top-any"
    Options = TopAnyOptions

    def __init__(self, embed_dim, num_experts, options=None):
        super().__init__(embed_dim, num_experts, options)
        nn.init.orthogonal_(self.weight)
        self.threshold = nn.Parameter(torch.zeros(num_experts))
        self.loss_weights = {
            BALANCE_LOSS: self.options.dyn_load_balance,
            "gate_diversity": self.options.dyn_aux,
            "gate_simplicity": self.options.dyn_aux,
        }
        if self.options.dyn_efficiency:
            self.loss_weights["gate_efficiency"] = self.options.dyn_efficiency
        self.counts = torch.zeros(1 + num_experts + embed_dim, dtype=torch.long)
        self.enter((num_experts,), (num_experts,))

    @classmethod
    def pool(cls, strata, options):
        return tuple(max(size, options.moe_max_experts) for size in strata)

    def enter(self, sizes, alive):
        super().enter(sizes, alive)
        alive_E = [place < live for size, live in zip(sizes, alive) for place in range(size)]
        self.alive_E = torch.tensor(alive_E, device=self.weight.device)

    # ----------------------------------------------------------------------------------
    # routing

    def forward(self, tokens_TD, here_T=None):
        margin_TE = self._margins(tokens_TD)
        rank_TE = margin_TE.detach().masked_fill(~self.alive_E, -torch.inf)
        best_T = rank_TE.argmax(dim=1)
        active_TE = rank_TE > 0
        served_T = active_TE.any(dim=1)
        counts = None
        if self.training and self.recording:
            counts = self._count(tokens_TD, active_TE, here_T)
        if self.training:  # the next stratum is the one after this gate's
            best_T = best_T.where(served_T, rank_TE[:, : self.sizes[0]].argmax(dim=1))
        else:
            active_TE.scatter_(1, best_T.unsqueeze(1), True)
        visits_TE = active_TE if here_T is None else active_TE & here_T.unsqueeze(1)
        token_C, expert_C = visits_TE.nonzero().unbind(1)
        number_T1 = active_TE.sum(dim=1, keepdim=True).clamp(min=1)
        straight_through_TE = active_TE.to(margin_TE.dtype) + (margin_TE - margin_TE.detach())
        shares_TE = straight_through_TE.masked_fill(~self.alive_E, 0) / number_T1
        return Choices(shares_TE, best_T, expert_C, token_C, counts=counts)

    def _margins(self, tokens_TD):
        """(T, E): above 0 where an expert is active."""
        dtype = torch.promote_types(tokens_TD.dtype, torch.float32)
        unit_ED = F.normalize(self.weight.to(dtype), dim=1, eps=_EPS)
        length_T1 = torch.linalg.vector_norm(tokens_TD, dim=1, keepdim=True, dtype=dtype)
        cosines_TE = gate_logits(tokens_TD, unit_ED) / length_T1.clamp(min=_EPS)
        return cosines_TE.sigmoid() - self.threshold.to(dtype).sigmoid()

    def preferences(self, tokens_TD):
        return self._margins(tokens_TD)

    def losses(self, choices, here_T=None):
        shares_TE, num_alive = choices.scores_TE, self.alive_E.sum()
        served_T = shares_TE.detach().any(dim=1)
        if here_T is not None:
            served_T = served_T & here_T
        number = served_T.sum().clamp(min=1)
        mean_E = shares_TE.masked_fill(~served_T.unsqueeze(1), 0).sum(dim=0) / number
        unit_ED = F.normalize(self.weight.to(shares_TE.dtype), dim=1, eps=_EPS)
        cosines_EE = gate_logits(unit_ED, unit_ED)
        pairs_EE = self.alive_E.outer(self.alive_E).fill_diagonal_(False)
        lengths_E = torch.linalg.vector_norm(self.weight, dim=1, dtype=shares_TE.dtype)
        losses = {
            BALANCE_LOSS: num_alive * (mean_E.detach() * mean_E).sum(),
            "gate_diversity": torch.linalg.vector_norm(cosines_EE.masked_fill(~pairs_EE, 0)),
            "gate_simplicity": lengths_E.masked_fill(~self.alive_E, 0).sum() / num_alive,
        }
        if self.options.dyn_efficiency:
            number_T = shares_TE.detach().ne(0).sum(dim=1).clamp(min=1)
            losses["gate_efficiency"] = (
                mean_over(shares_TE.sum(dim=1) * number_T, here_T) / num_alive
            )
        return losses

    def expected_choices(self):
        """In evaluation, if a token's cosine with each expert is as often positive as not, as it is
        with the initial vectors."""
        number = sum(self.num_alive())
        return number / 2 + 2**-number

    # ----------------------------------------------------------------------------------
    # experts that come and go

    def records(self, update):
        interval = self.options.dyn_update_interval
        return (
            interval > 0 and (update - 1) % interval >= interval - self.options.dyn_record_interval
        )

    @torch.no_grad()
    def _count(self, tokens_TD, active_TE, here_T):
        """What one pass adds to :attr:`counts`. Sums of tokens are integers, too: they depend
        neither on the order of addition nor on the model's precision."""
        served_T = active_TE.any(dim=1)
        if here_T is not None:
            active_TE, served_T = active_TE & here_T.unsqueeze(1), served_T | ~here_T
        unserved_UD = tokens_TD[~served_T].double()
        num_tokens = torch.as_tensor(len(tokens_TD) if here_T is None else here_T.sum())
        return torch.cat(
            [
                num_tokens.to(active_TE.device).view(1),
                active_TE.sum(dim=0),
                (unserved_UD * _FRACTION).round().long().sum(dim=0),
            ]
        )

    @property
    def counted(self):
        """What :attr:`counts` holds: the number of tokens, (E,) how many of them visited each
        expert, and (D,) the sum of those that visited none."""
        num_experts, embed_dim = self.weight.shape
        num_tokens, visits_E, unserved_D = self.counts.split([1, num_experts, embed_dim])
        return int(num_tokens), visits_E.clone(), unserved_D.double() / _FRACTION

    @classmethod
    def after_update(cls, block, update):
        interval = block.gates[0].options.dyn_update_interval
        if not interval or update % interval:
            return []
        return change_experts(block)
