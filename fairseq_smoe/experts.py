"""The experts of a block: E feed-forward networks held in stacked parameters."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Experts(nn.Module):
    """E two-layer feed-forward networks: linear, activation, linear, with biases (paper, section 3).

    Parameters are stacked over experts in stratum order: ``fc1_weight`` (E, D, F), ``fc1_bias``
    (E, F), ``fc2_weight`` (E, F, D), ``fc2_bias`` (E, D).
    """

    def __init__(self, num_experts, embed_dim, ffn_dim, activation_fn=F.relu, activation_dropout=0.0):
        super().__init__()
        self.activation_fn = activation_fn
        self.activation_dropout = activation_dropout
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, embed_dim, ffn_dim))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, ffn_dim))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, ffn_dim, embed_dim))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, embed_dim))
        self.reset_parameters()

    def reset_parameters(self):
        """Initialise every expert as ``nn.Linear`` would: a dense FFN starts the same way."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def unbind(self):
        """One (fc1_weight, fc1_bias, fc2_weight, fc2_bias) per expert.

        Called once per block forward and shared by its passes: the gradients of all experts are
        then stacked once, instead of once per pass.
        """
        return list(
            zip(
                self.fc1_weight.unbind(),
                self.fc1_bias.unbind(),
                self.fc2_weight.unbind(),
                self.fc2_bias.unbind(),
            )
        )

    def forward(self, rows_ND, rows_per_expert, expert_weights):
        """Apply to each run of rows its expert.

        Args:
            rows_ND: rows sorted by expert.
            rows_per_expert: length of each expert's run; sums to N.
            expert_weights: the entries of :meth:`unbind` that belong to the runs.

        Returns:
            (N, D)
        """
        outputs = []
        for run_MD, (w1, b1, w2, b2) in zip(rows_ND.split(rows_per_expert), expert_weights):
            # in training an idle expert takes part with no row, so that it has a (zero) gradient
            if len(run_MD) or self.training:
                hidden_MF = self.activation_fn(torch.addmm(b1, run_MD, w1))
                hidden_MF = F.dropout(hidden_MF, self.activation_dropout, self.training)
                outputs.append(torch.addmm(b2, hidden_MF, w2))
        return torch.cat(outputs) if outputs else rows_ND
