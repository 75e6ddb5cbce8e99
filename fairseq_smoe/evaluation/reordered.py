"""Weights in the order in which oneDNN reads them, for translation on CPUs of the x86 family.

A step of beam search multiplies few rows with all weights of the decoder, so that it takes as long
as reading them. torch's product of float32 matrices reads row after row, at a fraction of the
memory's speed; with weights in oneDNN's own order it reads them in one stream. The sums of a row do
not depend on how many other rows there are (but for a single one), which torch's do.
"""

import platform

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.evaluation.replaced_linears import replace_linears

ROWS = 80  # for which oneDNN chooses the order; it is read as fast with 1 and with 320


class ReorderedLinear(nn.Module):
    """A linear layer.

    Args:
        weight_OI: float32, (outputs, inputs).
        bias_O: float32, or None.
    """

    def __init__(self, weight_OI, bias_O=None):
        super().__init__()
        weight_OI = weight_OI.detach().contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS)
        self.bias = None if bias_O is None else bias_O.detach()

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        some = rounded_up(rows)
        if some == rows:
            return self._multiply(x)
        x_MI = F.pad(x.flatten(0, -2), (0, 0, 0, some - rows))
        y_MO = self._multiply(x_MI)[:rows]
        return y_MO.view(*x.shape[:-1], y_MO.shape[-1])

    def _multiply(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    @classmethod
    def joined(cls, layers):
        """One layer with the outputs of several."""
        biases = [layer.bias for layer in layers]
        bias = None if biases[0] is None else torch.cat(biases)
        return cls(torch.cat([layer.weight.to_dense() for layer in layers]), bias)


def rounded_up(rows):
    """A number of rows that is at most an eighth larger, of which there are few. oneDNN compiles a
    product for every number that it meets, and keeps it, for which a server's memory would grow."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def can_reorder(device):
    """Whether a device can multiply with reordered weights."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and platform.machine().lower() in ("x86_64", "amd64")
    )


def reorder(model):
    """Replace the linear layers of a model, and its experts if they are of the kind ``ffn``, in
    place.

    Args:
        model: an ``SMoETransformer`` in evaluation mode, in float32, on a device for which
            :func:`can_reorder` is true.
    """
    replace_linears(model, ReorderedLinear)
