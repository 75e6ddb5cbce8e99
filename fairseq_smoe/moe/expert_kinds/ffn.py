"""The experts of the paper: E feed-forward networks held in stacked parameters."""

import functools
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_loop import expert_loop
from fairseq_smoe.moe.experts import Experts
from fairseq_smoe.moe.grouped_linear import (
    ALIGNMENT,
    grouped_linear,
    grouped_mm_is_fast,
    grouped_mm_takes,
)
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.shared_weight import SharedWeight

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "loop", "grouped_mm")


@dataclass
class FFNOptions(KindOptions):
    moe_expert_backend: str = option(
        "auto",
        "how the experts multiply: 'loop' one by one, 'grouped_mm' with torch's function of that "
        "name, without waiting for the GPU. 'auto': the latter in bfloat16 on GPUs of compute "
        "capability 9.x and 10.x, which have a kernel for it. Changes speed only",
    )

    def check(self, strata, options):
        if self.moe_expert_backend not in BACKENDS:
            raise OptionError(
                f"--moe-expert-backend {self.moe_expert_backend}: expected {' or '.join(BACKENDS)}"
            )


class FFNExperts(Experts):
    """Two-layer feed-forward networks: linear, activation, linear, with biases (paper, section 3).

    Parameters are stacked over experts in stratum order: ``fc1_weight`` (E, D, F), ``fc1_bias``
    (E, F), ``fc2_weight`` (E, F, D), ``fc2_bias`` (E, D).
    """

    name = "ffn"
    Options = FFNOptions

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.make_parameters()

    def make_parameters(self):
        widths = {"fc1": (self.embed_dim, self.ffn_dim), "fc2": (self.ffn_dim, self.embed_dim)}
        for layer, (width, out_width) in widths.items():
            # as in nn.Linear, so that experts are initialised like a dense FFN
            bound = 1 / math.sqrt(width)
            for name, shape in (("weight", (width, out_width)), ("bias", (out_width,))):
                tensor_E = torch.empty(sum(self.strata), *shape).uniform_(-bound, bound)
                self.add_stacked(f"{layer}_{name}", tensor_E)

    def weights(self, dtype):
        """Weights and biases of both layers: (E, D, F), (E, F), (E, F, D), (E, D)."""
        return tuple(parameter.to(dtype) for parameter in self.stacked())

    def share(self, dtype):
        """:class:`SharedExperts`

        Raises:
            ValueError: backend "grouped_mm" cannot multiply with these weights.
        """
        device = self.stacked()[0].device.type
        dtype = autocast_type(device, dtype)
        w1, b1, w2, b2 = self.weights(dtype)
        grouped = self.multiplies_in_groups(w1)
        _log_once("grouped_mm" if grouped else "loop", device, dtype)
        waits = not grouped or self.exchanges
        return SharedExperts(SharedWeight(w1, b1), SharedWeight(w2, b2), grouped, waits)

    def multiplies_in_groups(self, w1):
        """Whether to multiply with ``grouped_mm``.

        Args:
            w1: (E, D, F) weights of a first layer.

        Raises:
            ValueError: backend "grouped_mm" cannot multiply with these weights.
        """
        backend = self.options.moe_expert_backend
        grouped = grouped_mm_is_fast(w1) if backend == "auto" else backend != "loop"
        if grouped and not grouped_mm_takes(w1):
            raise ValueError(
                f"backend='grouped_mm': cannot take experts of {tuple(w1.shape[1:])} {w1.dtype}; "
                f"rows have to be a multiple of {ALIGNMENT} bytes, and the type not float64"
            )
        return grouped

    def widths_here(self):
        """Numbers of hidden units of the experts in :meth:`stacked`; None if all of them exist."""
        return None

    def multiply(self, rows_ND, runs, shared, experts):
        return two_layers(rows_ND, runs, shared, experts, self.activation(), self.widths_here())

    def activation(self):
        """The function between the layers."""
        drops = self.training and self.activation_dropout
        return self._activate_and_drop if drops else self.activation_fn

    def _activate_and_drop(self, hidden_NF):
        return F.dropout(self.activation_fn(hidden_NF), self.activation_dropout)


def autocast_type(device, dtype):
    """The type that tokens of type ``dtype`` are multiplied in on a type of device."""
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def two_layers(rows_ND, runs, shared, experts, activate, widths=None):
    """Apply both layers of each expert to its run of rows, with either backend.

    Args:
        shared: :class:`SharedExperts`
        activate: function between the layers.
        widths: see :func:`~fairseq_smoe.moe.expert_loop.expert_loop`; with this backend only.

    Returns:
        (N, D)
    """
    rows_ND = rows_ND.to(shared.fc1.weight_EIO.dtype)
    if not shared.grouped:
        weights = shared.fc1, shared.fc2
        return expert_loop(rows_ND, runs.rows_per_expert, *weights, experts, activate, widths)
    hidden_NF = activate(grouped_linear(rows_ND, shared.fc1, experts, runs))
    return grouped_linear(hidden_NF, shared.fc2, experts, runs)


@functools.cache
def _log_once(backend, device, dtype):
    logger.info(f"experts multiply by {backend} ({dtype}, {device})")


@dataclass(frozen=True)
class SharedExperts:
    """The weights of both layers for all passes of a block.

    Attributes:
        fc1, fc2: :class:`~fairseq_smoe.moe.shared_weight.SharedWeight`
        grouped: whether to multiply with ``grouped_mm``.
        waits: whether the host needs the numbers of rows, for which it waits for the device.
    """

    fc1: SharedWeight
    fc2: SharedWeight
    grouped: bool
    waits: bool
