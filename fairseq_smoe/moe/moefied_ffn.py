"""A dense feed-forward network that is split into small experts (MoEfication)."""

import torch
from torch import nn

from fairseq_smoe.moe.dispatch import Runs
from fairseq_smoe.moe.expert_kinds.moefied import MoefiedExperts


class MoefiedFFN(nn.Module):
    """Both linear layers of a dense feed-forward network and the ReLU between them, as small
    experts: :class:`~fairseq_smoe.moe.expert_kinds.moefied.MoefiedExperts` of a single network.

    Args:
        fc1, fc2: the ``nn.Linear`` layers whose weights it begins with; their hidden units are
            divided in their order.
        options: :class:`~fairseq_smoe.moe.expert_kinds.moefied.MoefiedOptions`
        activation_dropout: on the hidden units.
    """

    def __init__(self, fc1, fc2, options, activation_dropout=0.0):
        super().__init__()
        self.experts = MoefiedExperts(
            (1,),
            fc1.in_features,
            fc1.out_features,
            options,
            activation_dropout=activation_dropout,
        )
        with torch.no_grad():
            self.experts.fc1_weight[0] = fc1.weight
            self.experts.fc1_bias[0] = fc1.bias
            self.experts.fc2_weight[0] = fc2.weight.t()
            self.experts.fc2_bias[0] = fc2.bias
        self.experts.start_routers()

    def forward(self, x):
        """(..., D) -> (..., D)"""
        rows_ND = x.reshape(-1, x.shape[-1])
        runs = Runs(torch.full((1,), len(rows_ND), device=x.device), len(rows_ND))
        shared = self.experts.share(x.dtype)
        return self.experts(rows_ND, runs, shared, range(1)).view(x.shape)
