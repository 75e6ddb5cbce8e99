"""Selecting the tokens that are at a gate.

Letters in names: T all tokens, H the tokens that are passed to the gate: those at the gate or, with
:class:`Masked`, all tokens.
"""

import torch


def select(tokens_TD, here_T, may_wait):
    """The tokens that ``here_T`` (T,) marks, or all where it is None.

    Args:
        may_wait: whether the host may wait for the device to learn how many tokens are marked.
    """
    if may_wait:
        return All() if here_T is None else Indexed(here_T)
    if here_T is None:
        here_T = torch.ones(len(tokens_TD), dtype=torch.bool, device=tokens_TD.device)
    return Masked(here_T)


class All:
    """All tokens are at the gate."""

    mask_H = None

    def take(self, all_T):
        """(T, ...) -> (H, ...)"""
        return all_T

    def put(self, all_T, new_H):
        """``all_T`` with new values for the tokens at the gate."""
        return new_H.to(all_T.dtype)


class Indexed:
    """The tokens at some indices. The host waits for the device to learn how many there are."""

    mask_H = None

    def __init__(self, here_T):
        self._index = here_T.nonzero().squeeze(1)

    def take(self, all_T):
        return all_T.index_select(0, self._index)

    def put(self, all_T, new_H):
        return all_T.index_copy(0, self._index, new_H.to(all_T.dtype))


class Masked:
    """All tokens are carried along, with a mask of those at the gate. The host then does not have
    to wait for the device to learn how many there are."""

    def __init__(self, here_T):
        self.mask_H = here_T

    def take(self, all_T):
        return all_T

    def put(self, all_T, new_H):
        mask = self.mask_H.view(-1, *[1] * (all_T.dim() - 1))
        return new_H.to(all_T.dtype).where(mask, all_T)
