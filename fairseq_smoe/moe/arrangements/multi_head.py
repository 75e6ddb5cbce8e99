"""MH-MoE: every token is split into heads, which are routed by themselves (Wu et al. 2024)."""

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.arrangement import Arrangement
from fairseq_smoe.moe.kind import KindOptions, option

HEADS = 4  # of the paper
RESIDUALS = ("paper", "released")


@dataclass
class MultiHeadOptions(KindOptions):
    moe_heads: Optional[int] = option(
        None,
        "MH-MoE: split every token into this many heads, which visit experts by themselves; 1 does "
        f"not split (default: 1, or {HEADS} with --moe-arrangement multi-head)",
    )
    moe_head_residual: str = option(
        "paper",
        "with --moe-heads: 'paper' adds the outputs of experts to the heads (eq. 6), 'released' "
        "merges the outputs alone, as the authors' code does",
    )

    def check(self, strata, options):
        if self.moe_heads is not None and self.moe_heads < 1:
            raise OptionError(f"--moe-heads {self.moe_heads}: expected 1 or more")
        if self.moe_head_residual not in RESIDUALS:
            raise OptionError(
                f"--moe-head-residual {self.moe_head_residual}: expected {' or '.join(RESIDUALS)}"
            )
        if num_heads(options) == 1 and self.moe_head_residual != RESIDUALS[0]:
            raise OptionError(f"--moe-head-residual {self.moe_head_residual}: needs --moe-heads")
        released = self.moe_head_residual == options.smoe_norm == "released"
        if released and num_heads(options) > 1:
            raise OptionError(
                "--moe-head-residual released with --smoe-norm released: a LayerNorm follows the "
                "last stratum, so the outputs of the experts cannot be told from the residual; "
                "drop one of them"
            )


def num_heads(options):
    """Heads of a token, from all options of the model."""
    if options.moe_heads is not None:
        return options.moe_heads
    return HEADS if MultiHead.is_chosen(options) else 1


class MultiHead(Arrangement):
    """``--moe-heads``: blocks that see heads of tokens."""

    name = "multi-head"
    Options = MultiHeadOptions

    @classmethod
    def is_chosen(cls, options):
        return (options.moe_heads or 1) > 1 or super().is_chosen(options)

    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        heads = HEADS if options.moe_heads is None else options.moe_heads
        if heads == 1:
            return make_block(embed_dim, ffn_dim)
        if embed_dim % heads:
            raise OptionError(
                f"--moe-heads {heads}: expected a divisor of the model dim, {embed_dim}"
            )
        block = make_block(embed_dim // heads, ffn_dim)
        return MultiHeadBlock(block, embed_dim, heads, options.moe_head_residual)


class MultiHeadBlock(nn.Module):
    """A block between two projections, which sees every token as H heads of dim D / H.

    The output is ``x + merge(block(head(norm(x))))``, where the block's input is split into heads
    and its output joined again. Heads go through the strata of the block by themselves.

    Args:
        block: of dim D / H.
        embed_dim, heads: D, H.
        residual: "paper" for the block as it is, with its residual connections, so that the value
            of a head is merged as well (eq. 6); "released" for the change that the block makes to
            the head alone.
    """

    def __init__(self, block, embed_dim, heads, residual="paper"):
        super().__init__()
        if residual not in RESIDUALS:
            raise ValueError(f"residual={residual!r}: expected one of {RESIDUALS}")
        self.block = block
        self.heads = heads
        self.residual = residual
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, embed_dim)
        self.merge = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.head.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def extra_repr(self):
        return f"heads={self.heads}, residual={self.residual}"

    def forward(self, x, padding_mask=None):
        """As :meth:`SMoEBlock.forward`; ``stats`` are those of the heads. Padding comes out
        unchanged."""
        heads = self.head(self.norm(x)).unflatten(-1, (self.heads, -1))
        mask = padding_mask
        if mask is not None:
            mask = mask.unsqueeze(-1)
        y, stats = self.block(heads, None if mask is None else mask.expand(heads.shape[:-1]))
        if self.residual == "released":
            y = y - heads
        y = x + self.merge(y.flatten(-2))
        if mask is not None:
            y = torch.where(mask, x, y)
        return y, replace(stats, heads=self.heads)
