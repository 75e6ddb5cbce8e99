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
        group: :class:`~fairseq_smoe.expert_group.ExpertGroup` of processes that share the experts:
            this one holds E / R of them, and the parameters are those. None for a process that
            holds all.
    """

    def __init__(
        self,
        num_experts,
        embed_dim,
        ffn_dim,
        activation_fn=F.relu,
        activation_dropout=0.0,
        backend="auto",
        group=None,
    ):
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected one of {BACKENDS}")
        self.backend = backend
        self.activation_fn = activation_fn
        self.activation_dropout = activation_dropout
        self.group = group
        self._all_experts = None
        for layer, width, out_width in (("fc1", embed_dim, ffn_dim), ("fc2", ffn_dim, embed_dim)):
            # as nn.Linear: a dense FFN starts the same way
            bound = 1 / math.sqrt(width)
            for name, shape in (("weight", (width, out_width)), ("bias", (out_width,))):
                tensor = torch.empty(num_experts, *shape).uniform_(-bound, bound)
                if group is not None:
                    tensor = group.share(tensor).clone()  # the same as with a process for all
                parameter = nn.Parameter(tensor)
                if group is not None:
                    parameter.expert = True  # fairseq's mark of what ranks do not have in common
                self.register_parameter(f"{layer}_{name}", parameter)

    @property
    def exchanges(self):
        """Whether rows go to other processes."""
        return self.group is not None and self._all_experts is None

    @torch.no_grad()
    def gather(self):
        """Get the experts of all processes, to compute alone until :meth:`release`: for those that
        do not go through the same steps. Every process of the group has to call this."""
        if self.group is not None:
            self._all_experts = [self.group.all_experts(own) for own in self._own()]

    def release(self):
        """Let go of other processes' experts."""
        self._all_experts = None

    def _own(self):
        # not parameters(): a model that is sharded has others, and these as attributes
        return self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias

    def share(self, dtype):
        """:class:`SharedExperts` for one forward pass of a block.

        Args:
            dtype: of the tokens, to which the parameters are cast; autocast has precedence.

        Raises:
            ValueError: backend "grouped_mm" cannot multiply with these weights.
        """
        parameters = self._all_experts or self._own()
        device = self.fc1_weight.device.type
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
        waits = not grouped or self.exchanges
        return SharedExperts(SharedWeight(w1, b1), SharedWeight(w2, b2), grouped, waits)

    def forward(self, rows_ND, runs, shared, experts):
        """Apply to each run of rows its expert.

        Args:
            rows_ND: rows sorted by expert; where they are exchanged, in the group's sending order.
            runs: :class:`~fairseq_smoe.dispatch.Runs` of the rows.
            shared: what :meth:`share` returned.
            experts: ``range`` of those that the runs belong to.

        Returns:
            (N, D)
        """
        if not self.exchanges:
            return self._multiply(rows_ND, runs, shared, experts)
        exchange = self.group.exchange(runs.rows_E, experts)
        rows_MD = exchange.send(rows_ND)
        if exchange.experts:  # of late strata, a process may have none
            rows_MD = self._multiply(rows_MD, exchange.runs, shared, exchange.experts)
        return exchange.send_back(rows_MD)

    def _multiply(self, rows_ND, runs, shared, experts):
        rows_ND = rows_ND.to(shared.fc1.weight_EIO.dtype)
        drops = self.training and self.activation_dropout
        activate = self._activate_and_drop if drops else self.activation_fn
        if not shared.grouped:
            rows_E = runs.rows_per_expert
            return expert_loop(rows_ND, rows_E, shared.fc1, shared.fc2, experts, activate)
        hidden_NF = activate(grouped_linear(rows_ND, shared.fc1, experts, runs))
        return grouped_linear(hidden_NF, shared.fc2, experts, runs)

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
        grouped: whether ``grouped_mm`` multiplies.
        waits: whether the host has to know numbers of rows, for which it waits for the device.
    """

    fc1: SharedWeight
    fc2: SharedWeight
    grouped: bool
    waits: bool
