"""The two baselines of the paper's tables that change how experts are arranged.

Vanilla MoE, Switch and EOM are options of :class:`~fairseq_smoe.smoe_block.SMoEBlock` itself.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.routing import gate_logits
from fairseq_smoe.selection import select
from fairseq_smoe.smoe_block import SMoEBlock
from fairseq_smoe.strata import own_experts


class StackedMoEBlock(SMoEBlock):
    """Stacking: L vanilla MoE layers in a row (paper, section 4.1).

    One LayerNorm before the first layer, one residual around all of them, nothing in between;
    every token visits every layer, so its requested capacity is always L.
    """

    def _visible_experts(self):
        return own_experts(self.strata)

    def _num_norms(self):
        return 1

    def _run(self, tokens_TD, real_T):
        shared = self.experts.share(tokens_TD.dtype)
        here = select(tokens_TD, real_T, may_wait=shared.waits)
        x_HD = here.take(tokens_TD)
        y_HD = self.norms[0](x_HD)
        gates, losses = [], []
        for i in range(len(self.strata)):
            y_HD, record, loss = self._visit(y_HD, i, shared, here.mask_H)
            gates.append(record)
            losses.append(loss)
        out_HD = x_HD + F.dropout(y_HD, self.dropout, self.training)
        passes_T = torch.zeros(len(tokens_TD), dtype=torch.long, device=tokens_TD.device)
        passes_T = here.put(passes_T, here.take(passes_T) + len(self.strata))
        return here.put(tokens_TD, out_HD), passes_T, gates, losses


class CMRBlock(nn.Module):
    """Conditional MoE routing: a dense FFN beside the experts, mixed per token by a sigmoid gate.

    With g the gate's value, the output is ``(1 - g) * (x + FFN(h)) + g * block(x)``, where h is
    the block's normalised input (Costa-jussa et al. 2022, section 6.2; the paper, section 4.1).

    Args:
        block: the expert branch.
        embed_dim, ffn_dim: sizes of the dense FFN.
        dropout, activation_dropout: as in the block.
        gate_drop: in training, the fraction of tokens whose gate is closed, so that the dense FFN
            alone serves them.
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
        """As :meth:`SMoEBlock.forward`; ``stats.shared_weight`` holds the gate of every real token."""
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
