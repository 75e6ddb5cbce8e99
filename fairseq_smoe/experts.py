"""The experts of a block: E feed-forward networks held in stacked parameters."""

import functools
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.expert_loop import expert_loop
from fairseq_smoe.grouped_linear import (
    ALIGNMENT,
    grouped_linear,
    grouped_mm_is_fast,
    grouped_mm_takes,
)
from fairseq_smoe.shared_weight import SharedWeight

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "loop", "grouped_mm")


class Experts(nn.Module):
    """E two-layer feed-forward networks: linear, activation, linear, with biases (paper, section 3).

    Parameters are stacked over experts in stratum order: ``fc1_weight`` (E, D, F), ``fc1_bias``
    (E, F), ``fc2_weight`` (E, F, D), ``fc2_bias`` (E, D).

    Args:
        num_experts, embed_dim, ffn_dim: E, D, F.
        activation_fn: element by element.
        activation_dropout: on the hidden units.
        backend: "loop" multiplies expert by expert; "grouped_mm" by torch's function of that name,
            without waiting for the device; "auto" takes that where torch has a kernel for it.
    """

    def __init__(
        self,
        num_experts,
        embed_dim,
        ffn_dim,
        activation_fn=F.relu,
        activation_dropout=0.0,
        backend="auto",
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
        self.backend = backend
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

    def share(self):
        """:class:`SharedExperts` for one forward pass of a block.

        Raises:
            ValueError: backend "grouped_mm" cannot multiply with these weights.
        """
        parameters = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        device, dtype = self.fc1_weight.device.type, self.fc1_weight.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        w1, b1, w2, b2 = (parameter.to(dtype) for parameter in parameters)
        grouped = grouped_mm_is_fast(w1) if self.backend == "auto" else self.backend != "loop"
        if grouped and not grouped_mm_takes(w1):
            raise ValueError(
                f"backend='grouped_mm': cannot take experts of {tuple(w1.shape[1:])} {w1.dtype}; "
                f"needs rows of a multiple of {ALIGNMENT} bytes, and no float64"
            )
        _log_once("grouped_mm" if grouped else "loop", device, dtype)
        return SharedExperts(SharedWeight(w1, b1), SharedWeight(w2, b2), grouped)

    def forward(self, rows_ND, dispatch, shared, experts):
        """Apply to each run of rows its expert.

        Args:
            rows_ND: rows sorted by expert.
            dispatch: :class:`~fairseq_smoe.dispatch.Dispatch` of the rows.
            shared: what :meth:`share` returned.
            experts: ``range`` of those that the runs belong to.

        Returns:
            (N, D)
        """
        rows_ND = rows_ND.to(shared.fc1.weight_EIO.dtype)
        drops = self.training and self.activation_dropout
        activate = self._activate_and_drop if drops else self.activation_fn
        if not shared.grouped:
            rows_E = dispatch.rows_per_expert
            return expert_loop(rows_ND, rows_E, shared.fc1, shared.fc2, experts, activate)
        hidden_NF = activate(grouped_linear(rows_ND, shared.fc1, experts, dispatch))
        return grouped_linear(hidden_NF, shared.fc2, experts, dispatch)

    def _activate_and_drop(self, hidden_NF):
        return F.dropout(self.activation_fn(hidden_NF), self.activation_dropout)


@functools.cache
def _log_once(backend, device, dtype):
    logger.info(f"experts multiply by {backend} ({dtype}, {device})")


@dataclass(frozen=True)
class SharedExperts:
    """The weights of both layers for all passes of a block.

    Attributes:
        fc1, fc2: :class:`~fairseq_smoe.shared_weight.SharedWeight`
        grouped: whether ``grouped_mm`` multiplies, so that nothing has to be known on the host.
    """

    fc1: SharedWeight
    fc2: SharedWeight
    grouped: bool
