"""The experts of HMoE (Wang et al. 2024, arXiv 2408.10681): feed-forward networks of different
widths.

Letters in names: T tokens at a gate, E experts, D model dim, F hidden dim of the widest expert.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts, FFNOptions
from fairseq_smoe.moe.gate import BALANCE_LOSS
from fairseq_smoe.moe.kind import option
from fairseq_smoe.moe.routing import parameter_penalty, router_entropy
from fairseq_smoe.moe.strata import visible_experts, visit_probabilities
from fairseq_smoe.moe.widths import SCHEDULES, read_widths, scheduled_widths

PENALTY = "moe_p_penalty"
ENTROPY = "moe_router_entropy"
DEFAULT_SCHEDULE = "arithmetic"
SCOPES = ("stratum", "block")


@dataclass
class SizedOptions(FFNOptions):
    moe_ffn_dims: Optional[str] = option(
        None,
        "with --moe-experts sized: hidden size of every expert, strata separated by slashes, e.g. "
        "64,192/128,384; a single number holds for all experts of its stratum, e.g. 64/256",
    )
    moe_size_schedule: Optional[str] = option(
        None,
        "with --moe-experts sized, in place of --moe-ffn-dims: hidden sizes that grow from expert "
        f"to expert, with the mean of equal experts; {', '.join(SCHEDULES)} (default: "
        f"{DEFAULT_SCHEDULE})",
    )
    moe_size_scope: str = option(
        "stratum",
        "with --moe-size-schedule: the sizes grow within every 'stratum', or over all experts of a "
        "'block', so that later strata are wider",
    )
    moe_p_penalty: float = option(
        0.1,
        "with --moe-experts sized: weight of the parameter penalty, which replaces the balance "
        "loss; 0 for the balance loss",
    )
    moe_router_entropy: float = option(
        0.0,
        "with --moe-experts sized: weight of the entropy of the gates' probabilities, so that "
        "fewer experts reach a threshold; the paper's is 0.03",
    )

    def check(self, strata, options):
        super().check(strata, options)
        if options.moe_experts != SizedExperts.name:
            return self.refuse_given(options.moe_experts, "--moe-experts sized")
        own = (
            ("--moe-ffn-dims", self.moe_ffn_dims),
            ("--moe-size-schedule", self.moe_size_schedule),
        )
        given = [f"{flag} {value}" for flag, value in own if value is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} contradict each other: drop one of them")
        if self.moe_ffn_dims is not None:
            read_widths(self.moe_ffn_dims, strata)
        if self.moe_size_schedule not in (None, *SCHEDULES):
            raise OptionError(
                f"--moe-size-schedule {self.moe_size_schedule}: expected {' or '.join(SCHEDULES)}"
            )
        if self.moe_size_scope not in SCOPES:
            raise OptionError(
                f"--moe-size-scope {self.moe_size_scope}: expected {' or '.join(SCOPES)}"
            )
        for flag, weight in (
            ("--moe-p-penalty", self.moe_p_penalty),
            ("--moe-router-entropy", self.moe_router_entropy),
        ):
            if not (weight >= 0 and math.isfinite(weight)):
                raise OptionError(f"{flag} {weight}: expected 0 or more")
            if weight and options.moe_gate == "top-any":
                raise OptionError(
                    f"{flag} {weight} with --moe-gate top-any: its scores are no probabilities; "
                    f"give {flag} 0, or another gate"
                )
        self._check_shared_options(options)

    def _check_shared_options(self, options):
        if self.moe_expert_backend == "grouped_mm":
            raise OptionError(
                "--moe-expert-backend grouped_mm with --moe-experts sized: it multiplies experts "
                "of equal size only; use loop or auto"
            )
        others = (
            ("--moe-ffn-split", getattr(options, "moe_ffn_split", 1), 1),
            ("--moe-ffn-dim", getattr(options, "moe_ffn_dim", None), None),
        )
        for flag, value, default in others:
            if self.moe_ffn_dims is not None and value != default:
                raise OptionError(
                    f"--moe-ffn-dims {self.moe_ffn_dims} with {flag} {value}: the sizes are those "
                    f"of the experts; drop {flag} and list all of them"
                )

    def widths(self, strata, ffn_dim):
        """Hidden size of every expert.

        Args:
            ffn_dim: hidden size of experts of equal size, which a schedule keeps as the mean.

        Raises:
            OptionError: the sizes do not fit the strata, or the schedule does not fit the size.
        """
        if self.moe_ffn_dims is not None:
            return read_widths(self.moe_ffn_dims, strata)
        groups = strata if self.moe_size_scope == "stratum" else (sum(strata),)
        schedule = self.moe_size_schedule or DEFAULT_SCHEDULE
        return [w for size in groups for w in scheduled_widths(schedule, size, ffn_dim)]


class SizedExperts(FFNExperts):
    """Feed-forward networks that differ in the number of hidden units.

    The parameters are stacked as those of :class:`~fairseq_smoe.moe.expert_kinds.ffn.FFNExperts`,
    with the hidden size of the widest expert. The hidden units that an expert does not have are
    zeros, are not computed, and get a gradient of zero, so that they stay zeros. Experts of equal
    widths are those of the parent class.

    Args:
        ffn_dim: hidden size of experts of equal size; see :meth:`SizedOptions.widths`.

    Attributes:
        widths: hidden size of each of the E experts, on whichever rank they are.
    """

    name = "sized"
    Options = SizedOptions

    def __init__(self, strata, embed_dim, ffn_dim, options=None, **more):
        options = self.Options() if options is None else options
        widths = options.widths(strata, ffn_dim)
        super().__init__(strata, embed_dim, max(widths), options, **more)
        self.widths = widths
        self.register_buffer("width_E", torch.tensor(widths), persistent=False)
        if min(widths) < max(widths):
            self._clear_padding()
        self.loss_weights = {ENTROPY: options.moe_router_entropy}
        if options.moe_p_penalty:
            self.loss_weights |= {PENALTY: options.moe_p_penalty, BALANCE_LOSS: 0.0}

    @torch.no_grad()
    def _clear_padding(self):
        self.add_padding([self._num_parameters_of(self.ffn_dim - width) for width in self.widths])
        for e, width in enumerate(self.widths_here()):
            for absent in (
                self.fc1_weight[e, :, width:],
                self.fc1_bias[e, width:],
                self.fc2_weight[e, width:],
            ):
                absent.zero_()
            # as in nn.Linear; the parent initialised them for ffn_dim units
            for parameter in (self.fc2_weight[e], self.fc2_bias[e]):
                parameter *= math.sqrt(self.ffn_dim / width)

    def _num_parameters_of(self, units):
        """Parameters of hidden units, without the bias of the second layer."""
        return units * (2 * self.embed_dim + 1)

    def widths_here(self):
        if self.padding is None:
            return None
        return self.group.share(self.widths) if self.exchanges else self.widths

    def multiplies_in_groups(self, w1_EDF):
        return False

    def losses(self, choices, visible, here_T=None):
        """The parameter penalty and the entropy of the gate's probabilities, each if its weight is
        not 0. The widths are normalised by their mean over the experts that the gate sees."""
        losses = {}
        if self.options.moe_p_penalty:
            width_E = self.width_E[visible.start : visible.stop]
            pairs = choices.token_C, choices.expert_C
            losses[PENALTY] = parameter_penalty(choices.scores_TE, *pairs, width_E, here_T)
        if self.options.moe_router_entropy:
            losses[ENTROPY] = router_entropy(choices.scores_TE, here_T)
        return losses

    def params_used(self, visible, choices):
        mean_width = sum(self.widths[e] for e in visible) / len(visible)
        return choices * (self._num_parameters_of(mean_width) + self.embed_dim)

    def hidden_dim(self):
        """The mean under uniform gates, over the rows of all passes."""
        seen = visible_experts(self.strata)
        visits = visit_probabilities(self.strata)
        means = [sum(self.widths[e] for e in experts) / len(experts) for experts in seen]
        return sum(map(math.prod, zip(visits, means))) / sum(visits)
