"""Routing counts of one expert block, as plain arrays.

Letters in names: V vocabulary, L strata (gates), E experts of the block.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockCounts:
    """The routing of one block's tokens, without padding.

    Attributes:
        side: "encoder" or "decoder".
        block: number of the block among those of its side, from 1.
        layer: number of its transformer layer, from 1.
        strata: experts of each stratum.
        types_VP: (V, L + 1) int64, tokens of each type that made 0 .. L passes; column 0 is empty.
        first_E: (E,) int64, passes in which an expert was the best choice.
        choices_E: (E,) int64, passes in which an expert was one of the choices.
        visits_L: (L,) int64, tokens that visited each gate.
    """

    side: str
    block: int
    layer: int
    strata: tuple
    types_VP: np.ndarray
    first_E: np.ndarray
    choices_E: np.ndarray
    visits_L: np.ndarray

    @property
    def exits_L(self):
        """(L,) tokens that left after 1 .. L passes."""
        return self.types_VP.sum(axis=0)[1:]

    @property
    def tokens(self):
        return int(self.exits_L.sum())

    @property
    def requested_capacity(self):
        """Mean number of passes, NaN without tokens."""
        passes = self.exits_L @ np.arange(1, len(self.strata) + 1)
        return float(passes) / self.tokens if self.tokens else float("nan")

    @property
    def stratum_of_expert_E(self):
        """(E,) stratum of each expert, from 0."""
        return np.repeat(np.arange(len(self.strata)), self.strata)

    def type_counts(self):
        """(V,) occurrences and (V,) mean requested capacity of every type; NaN if it does not
        occur."""
        count_V = self.types_VP.sum(axis=1)
        passes_V = self.types_VP @ np.arange(len(self.strata) + 1)
        return count_V, np.divide(
            passes_V, count_V, out=np.full(len(count_V), np.nan), where=count_V > 0
        )
