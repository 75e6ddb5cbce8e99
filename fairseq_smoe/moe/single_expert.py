"""Views of a block in which some tokens visit a single expert at every gate: the weak view of
self-contrast decoding (SCMoE, Shi et al. 2024, arXiv 2405.14507).

Letters in names: T tokens at the gate, E experts the gate sees, C choices of a token and an expert.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Optional

import torch

STRONG = -1  # the key of tokens that the gates route as ever


@dataclass(frozen=True)
class SingleExpert:
    """Which expert a token visits.

    Attributes:
        rank: that of the rank-th largest preference, from 1; the last one where a gate sees fewer.
            None for any expert, drawn by the token's key.
    """

    rank: Optional[int] = 2

    def choose(self, gate, tokens_TD, key_T, salt):
        """(T,) int64, the expert of every token.

        Args:
            gate: :class:`~fairseq_smoe.moe.gate.Gate`
            tokens_TD: normalised tokens.
            key_T, salt: decide together which expert is drawn.
        """
        alive_E = gate.alive_E
        number = len(gate.weight) if alive_E is None else int(alive_E.sum())
        if self.rank is None:
            draw_T = (scrambled(key_T, salt) & 0xFFFFFF) * number >> 24
            return draw_T if alive_E is None else alive_E.nonzero().squeeze(1)[draw_T]
        preferences_TE = gate.preferences(tokens_TD)
        if alive_E is not None:
            preferences_TE = preferences_TE.masked_fill(~alive_E, -torch.inf)
        order_TE = preferences_TE.sort(dim=1, descending=True, stable=True).indices
        return order_TE[:, min(self.rank, number) - 1]


@dataclass(frozen=True)
class View:
    """How a block routes its next input.

    Attributes:
        rule: :class:`SingleExpert`
        keys: int64, of the leading dimensions of the block's input. :data:`STRONG` for tokens that
            are routed as ever. Other tokens visit a single expert with weight 1; their keys are
            what random draws depend on.
        number: of the block, so that draws differ between blocks.
    """

    rule: SingleExpert
    keys: torch.Tensor
    number: int = 0

    def keys_of(self, shape):
        """(T,) keys of the tokens of an input, (*shape, D). Tokens may be split into heads."""
        keys = self.keys
        for size in shape[keys.dim() :]:
            parts = torch.arange(size, device=keys.device)
            strong = (keys == STRONG).unsqueeze(-1)
            keys = torch.where(strong, STRONG, scrambled(keys.unsqueeze(-1) + parts))
        return keys.reshape(-1)

    def route(self, gate, tokens_TD, choices, key_T):
        """What the tokens visit.

        Args:
            gate: :class:`~fairseq_smoe.moe.gate.Gate`
            tokens_TD: normalised tokens.
            choices: the gate's own :class:`~fairseq_smoe.moe.gate.Choices`.
            key_T: see :meth:`keys_of`.

        Returns:
            ``(choices, weights_C)``
        """
        single_T = key_T != STRONG
        salt = 64 * self.number + gate.stratum
        expert_T = self.rule.choose(gate, tokens_TD, key_T, salt)
        token_S = single_T.nonzero().squeeze(1)
        own = single_T.logical_not()[choices.token_C].nonzero().squeeze(1)  # of the choices
        weights_C = gate.weights(choices)[own]
        routed = replace(
            choices,
            best_T=torch.where(single_T, expert_T, choices.best_T),
            expert_C=torch.cat([choices.expert_C[own], expert_T[token_S]]),
            token_C=torch.cat([choices.token_C[own], token_S]),
        )
        return routed, torch.cat([weights_C, weights_C.new_ones(len(token_S))])


@contextmanager
def viewed(blocks, rule, keys):
    """Let blocks route the rows with keys to single experts while a context lasts.

    Args:
        blocks: list of :class:`~fairseq_smoe.moe.block.SMoEBlock`, all in evaluation.
        rule, keys: see :class:`View`.
    """
    try:
        for number, block in enumerate(blocks):
            block.view = View(rule, keys, number)
        yield
    finally:
        for block in blocks:
            block.view = None


def scrambled(numbers, salt=0):
    """Pseudo-random numbers from 0 to 2^63 - 1 that depend on each of ``numbers``, int64, and the
    salt alone (the finaliser of SplitMix64)."""
    numbers = numbers + _signed((salt + 1) * 0x9E3779B97F4A7C15)  # wraps around
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ _shifted(numbers, shift)) * _signed(factor)
    return (numbers ^ _shifted(numbers, 31)) & torch.iinfo(torch.int64).max


def _shifted(numbers, shift):
    """To the right, as if without sign."""
    return numbers >> shift & ((1 << (64 - shift)) - 1)


def _signed(number):
    """The same 64 bits as an int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
