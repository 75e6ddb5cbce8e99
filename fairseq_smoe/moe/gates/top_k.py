"""The gate of the paper: every token visits its k best experts."""

from dataclasses import dataclass

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.gate import Choices, Gate
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.routing import choose_experts, combine_weights, expert_capacity

SECOND_EXPERT_POLICIES = ("all", "sampling")


@dataclass
class TopKOptions(KindOptions):
    moe_top1_expert: bool = option(False, "one expert per pass instead of two (Switch Transformer)")
    moe_second_expert_policy: str = option(
        "sampling",
        "second expert in training: 'sampling' draws it from the gate's distribution, 'all' takes "
        "the one with the second-highest probability, as translation always does",
    )
    moe_capacity_factor: float = option(
        2.0,
        "in training an expert takes at most this many times its even share of a gate's tokens; "
        "0 for no limit. Translation never drops tokens",
    )

    def check(self, strata, options):
        if self.moe_second_expert_policy not in SECOND_EXPERT_POLICIES:
            raise OptionError(
                f"--moe-second-expert-policy {self.moe_second_expert_policy}: expected "
                f"{' or '.join(SECOND_EXPERT_POLICIES)}"
            )
        if self.moe_capacity_factor < 0:
            raise OptionError(
                f"--moe-capacity-factor {self.moe_capacity_factor}: expected 0 (no limit) or more"
            )


def refuse_top_k_options(options, gate, who_decides):
    """Refuse options of this gate with another that takes any number of experts and has no capacity.

    Args:
        options: all options of the model.
        gate: name of the other gate.
        who_decides: what decides on the number of experts, and what to do instead.

    Raises:
        OptionError: one of the options is given.
    """
    if options.moe_top1_expert:
        raise OptionError(f"--moe-top1-expert with --moe-gate {gate}: {who_decides}")
    if options.moe_capacity_factor not in (0, TopKOptions.moe_capacity_factor):
        raise OptionError(
            f"--moe-capacity-factor {options.moe_capacity_factor} with --moe-gate {gate}: the "
            "experts of this gate have no capacity; leave it out"
        )


class TopKGate(Gate):
    """Every token visits the one or two experts of highest probability (paper, section 3.2)."""

    name = "top-k"
    Options = TopKOptions

    def __init__(self, embed_dim, num_experts, options=None):
        super().__init__(embed_dim, num_experts, options)
        self.top_k = min(1 if self.options.moe_top1_expert else 2, num_experts)

    def forward(self, tokens_TD, here_T=None):
        logits_TE = self.logits(tokens_TD)
        scores_TE = logits_TE.softmax(dim=1)
        sample = self.training and self.options.moe_second_expert_policy == "sampling"
        return Choices.ranked(scores_TE, choose_experts(logits_TE, self.top_k, sample))

    def preferences(self, tokens_TD):
        return self.logits(tokens_TD)

    def capacity(self, num_tokens):
        factor = self.options.moe_capacity_factor
        return expert_capacity(num_tokens, len(self.weight), factor) if factor else None

    def weights(self, choices, kept_C=None):
        shape = self.top_k, -1
        kept_KT = None if kept_C is None else kept_C.view(shape)
        return combine_weights(choices.scores_TE, choices.expert_C.view(shape), kept_KT).view(-1)
