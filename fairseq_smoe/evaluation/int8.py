"""Models with weights in 8 bits, for CPUs.

The weights of linear layers and of experts are rounded to 255 steps for each output unit
(symmetric, by the greatest weight); the inputs to 256 steps for each product, when they are known
(dynamic quantisation). The products are torch's (``torch.ops.quantized.linear_dynamic``).
Embeddings, LayerNorms, gates and attention stay in float32.
"""

import torch
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.replaced_linears import is_replaceable, replace_linears
from fairseq_smoe.translation.layers import expert_layers


class Int8Linear(nn.Module):
    """A linear layer.

    Args:
        weight_OI: float32, (outputs, inputs).
        bias_O: float32, or None.
    """

    def __init__(self, weight_OI, bias_O=None):
        super().__init__()
        weight_OI = weight_OI.detach().float()
        scale_O = (weight_OI.abs().amax(dim=1) / 127).double()
        scale_O[scale_O == 0] = 1
        zero_O = torch.zeros(len(weight_OI), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight_OI, scale_O, zero_O, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(
            quantised, None if bias_O is None else bias_O.detach().float()
        )

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x, self.packed)

    @classmethod
    def joined(cls, layers):
        """One layer with the outputs of several, which are the same numbers as theirs: the weights
        are rounded already, and the inputs are the same."""
        parts = [torch.ops.quantized.linear_unpack(layer.packed) for layer in layers]
        biases = [bias for _, bias in parts]
        bias = None if biases[0] is None else torch.cat(biases)
        return cls(torch.cat([weight.dequantize() for weight, _ in parts]), bias)


def quantise(model):
    """Replace the linear layers and experts of a model, in place.

    Args:
        model: an ``SMoETransformer`` in evaluation mode, on the CPU, in float32.

    Raises:
        OptionError: its experts are of another kind than ``ffn``.
    """
    if not all(is_replaceable(layer.routed_block.experts) for _, layer in expert_layers(model)):
        raise OptionError("dtype int8: works with --moe-experts ffn only; use float32 or bfloat16")
    replace_linears(model, Int8Linear)
