"""The gate of XMoE (Yang et al. 2024, arXiv 2403.18926): as many experts as a token needs."""

import math
from dataclasses import dataclass

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.gate import Choices, Gate
from fairseq_smoe.moe.gates.top_k import refuse_top_k_options
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.routing import renormalise, select_top_p

WEIGHTS = ("raw", "renormalised")


@dataclass
class ThresholdOptions(KindOptions):
    moe_threshold: str = option(
        "0.9",
        "with --moe-gate threshold: a token visits its best experts until their probabilities add "
        "up to this, from 0 (the best expert only) to 1 (all); one number, or one for every "
        "stratum, e.g. 0.9,0.5. May be changed for translation with --model-overrides",
    )
    moe_threshold_weights: str = option(
        "raw",
        "with --moe-gate threshold: 'raw' weights experts by their probabilities, as XMoE does; "
        "'renormalised' divides by the sum over the experts that the token visits, as HMoE does",
    )

    def check(self, strata, options):
        numbers = self.thresholds()
        if len(numbers) not in (1, len(strata)):
            raise OptionError(
                f"--moe-threshold {self.moe_threshold}: expected one number, or one for each of "
                f"the {len(strata)} strata"
            )
        if self.moe_threshold_weights not in WEIGHTS:
            raise OptionError(
                f"--moe-threshold-weights {self.moe_threshold_weights}: expected "
                f"{' or '.join(WEIGHTS)}"
            )
        if options.moe_gate != ThresholdGate.name:
            return self.refuse_given(options.moe_gate, "--moe-gate threshold")
        refuse_top_k_options(
            options,
            ThresholdGate.name,
            "the threshold decides how many experts a token visits; give --moe-threshold 0 for one",
        )

    def thresholds(self):
        """The numbers: one, or one for every stratum.

        Raises:
            OptionError: they are no numbers from 0 to 1.
        """
        try:
            numbers = [float(text) for text in str(self.moe_threshold).split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(0 <= number <= 1 for number in numbers):
            raise OptionError(
                f"--moe-threshold {self.moe_threshold}: expected numbers from 0 to 1, joined by "
                "commas"
            )
        return numbers


class ThresholdGate(Gate):
    """Every token visits its best experts until their probabilities add up to the threshold. The
    experts have no capacity. The balance loss counts the best expert alone."""

    name = "threshold"
    Options = ThresholdOptions

    @property
    def threshold(self):
        """That of this gate's stratum."""
        numbers = self.options.thresholds()
        return numbers[self.stratum] if len(numbers) > 1 else numbers[0]

    def extra_repr(self):
        return f"{super().extra_repr()}, threshold={self.threshold}"

    def forward(self, tokens_TD, here_T=None):
        scores_TE = self.logits(tokens_TD).softmax(dim=1)
        visits_TE = select_top_p(scores_TE, self.threshold)
        if here_T is not None:
            visits_TE &= here_T.unsqueeze(1)
        return Choices.where(scores_TE, visits_TE)

    def preferences(self, tokens_TD):
        return self.logits(tokens_TD)

    def weights(self, choices, kept_C=None):
        weights_C = super().weights(choices, kept_C)
        if self.options.moe_threshold_weights == "raw":
            return weights_C
        return renormalise(weights_C, choices.token_C, choices.expert_C, choices.scores_TE.shape)
