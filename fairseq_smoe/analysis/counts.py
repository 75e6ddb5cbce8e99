"""Routing counts of one expert block, as plain arrays.

Letters in names: V vocabulary, L strata (gates), E experts of the block.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockCounts:
    """The routing of one block's tokens, without padding.

    If tokens are split into heads, all arrays count heads; :attr:`tokens` and :meth:`type_counts`
    count tokens.

    Attributes:
        side: "encoder" or "decoder".
        block: number of the block among those of its side, from 1.
        layer: number of its transformer layer, from 1.
        strata: experts of each stratum.
        types_VP: (V, L + 1) int64, tokens of each type that made 0 .. L passes; column 0 is empty.
        first_E: (E,) int64, passes in which an expert was the best choice.
        choices_E: (E,) int64, passes in which an expert was one of the choices.
        visits_L: (L,) int64, tokens that visited each gate.
        chosen_L: (L,) int64, experts that these tokens have chosen there.
        heads: number of parts of a token.
    """

    side: str
    block: int
    layer: int
    strata: tuple
    types_VP: np.ndarray
    first_E: np.ndarray
    choices_E: np.ndarray
    visits_L: np.ndarray
    chosen_L: np.ndarray
    heads: int = 1

    @property
    def exits_L(self):
        """(L,) tokens that left after 1 .. L passes."""
        return self.types_VP.sum(axis=0)[1:]

    @property
    def tokens(self):
        return int(self.exits_L.sum()) // self.heads

    @property
    def requested_capacity(self):
        """Mean number of passes, NaN without tokens."""
        passes = self.exits_L @ np.arange(1, len(self.strata) + 1)
        return _ratio(passes, self.tokens * self.heads)

    @property
    def experts_per_token(self):
        """Mean number of experts that a token has visited, with all of its heads, in all passes;
        NaN without tokens."""
        return _ratio(self.chosen_L.sum(), self.tokens)

    @property
    def experts_per_visit_L(self):
        """Mean number of experts that a token (with heads: a head) has chosen at each gate; NaN
        where there were none."""
        return [_ratio(chosen, visits) for chosen, visits in zip(self.chosen_L, self.visits_L)]

    @property
    def stratum_of_expert_E(self):
        """(E,) stratum of each expert, from 0."""
        return np.repeat(np.arange(len(self.strata)), self.strata)

    def type_counts(self):
        """(V,) occurrences and (V,) mean requested capacity of every type; NaN if it does not
        occur."""
        count_V = self.types_VP.sum(axis=1)
        passes_V = self.types_VP @ np.arange(len(self.strata) + 1)
        return count_V // self.heads, np.divide(
            passes_V, count_V, out=np.full(len(count_V), np.nan), where=count_V > 0
        )


def _ratio(number, of):
    return float(number) / float(of) if of else float("nan")
