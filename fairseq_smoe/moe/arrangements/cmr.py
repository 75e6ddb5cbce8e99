"""Conditional MoE routing, a baseline of the paper: a dense FFN beside the experts."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.arrangement import Arrangement
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.routing import gate_logits


@dataclass
class CMROptions(KindOptions):
    moe_cmr: bool = option(
        False, "conditional MoE routing: a dense FFN beside the experts, mixed by a gate per token"
    )
    cmr_gate_drop: float = option(
        0.0, "with --moe-cmr: fraction of tokens that bypass the experts in training"
    )

    def check(self, strata, options):
        if not 0 <= self.cmr_gate_drop < 1:
            raise OptionError(
                f"--cmr-gate-drop {self.cmr_gate_drop}: expected a fraction from 0 up to, but not, 1"
            )


class CMR(Arrangement):
    """``--moe-cmr``: a dense FFN beside every block."""

    name = "cmr"
    Options = CMROptions

    @classmethod
    def is_chosen(cls, options):
        return options.moe_cmr or super().is_chosen(options)

    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        block = make_block(embed_dim, ffn_dim)
        drop = options.cmr_gate_drop
        return CMRBlock(block, embed_dim, ffn_dim, gate_drop=drop, **ffn_options)


class CMRBlock(nn.Module):
    """Conditional MoE routing: a dense FFN beside the experts, mixed per token by a sigmoid gate.

    With g the gate's value, the output is ``(1 - g) * (x + FFN(h)) + g * block(x)``, where h is
    the block's normalised input (Costa-jussa et al. 2022, section 6.2; the paper, section 4.1).

    Args:
        block: the expert branch.
        embed_dim, ffn_dim: sizes of the dense FFN.
        dropout, activation_dropout: as in the block.
        gate_drop: in training, the gate of this fraction of tokens is set to 0, so that they use
            only the dense FFN.
    """

    def __init__(
        self,
        block,
        embed_dim,
        ffn_dim,
        dropout=0.0,
        activation_dropout=0.0,
        gate_drop=0.0,
        activation_fn=F.relu,
    ):
        super().__init__()
        self.block = block
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)
        self.cmr_gate = nn.Linear(embed_dim, 1)
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.gate_drop = gate_drop
        self.activation_fn = activation_fn

    def forward(self, x, padding_mask=None):
        """As :meth:`SMoEBlock.forward`; ``stats.shared_weight`` has the gate's value for every
        token that is not padding."""
        y, stats = self.block(x, padding_mask)
        h = self.block.norms[0](x)
        hidden = F.dropout(self.activation_fn(self.fc1(h)), self.activation_dropout, self.training)
        dense = x + F.dropout(self.fc2(hidden), self.dropout, self.training)
        gate = torch.sigmoid(gate_logits(h, self.cmr_gate.weight) + self.cmr_gate.bias)
        weight = gate
        if self.training and self.gate_drop:
            weight = gate * (torch.rand_like(gate) >= self.gate_drop)
        mixed = dense + weight.to(dense.dtype) * (y - dense)
        gate = gate.squeeze(-1)
        if padding_mask is not None:
            mixed = torch.where(padding_mask.unsqueeze(-1), y, mixed)
            gate = gate[~padding_mask]
        return mixed, replace(stats, shared_weight=gate.reshape(-1))
