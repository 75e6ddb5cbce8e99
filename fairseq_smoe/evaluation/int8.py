"""Models with weights in 8 bits, for CPUs.

The weights of linear layers and of experts are rounded to 255 steps for each output unit
(symmetric, by the greatest weight); the inputs to 256 steps for each product, when they are known
(dynamic quantisation). The products are torch's (``torch.ops.quantized.linear_dynamic``).
Embeddings, LayerNorms, gates and attention stay in float32.
"""

from types import SimpleNamespace

import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts
from fairseq_smoe.moe.experts import Experts
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


class Int8Experts(Experts):
    """The experts of a block, for translation only.

    Args:
        experts: :class:`~fairseq_smoe.moe.expert_kinds.ffn.FFNExperts`
    """

    name = "int8"
    Options = FFNExperts.Options

    def __init__(self, experts):
        super().__init__(
            experts.strata,
            experts.embed_dim,
            experts.ffn_dim,
            experts.options,
            experts.activation_fn,
        )
        w1_EDF, b1_EF, w2_EFD, b2_ED = experts.stacked()
        self.fc1 = nn.ModuleList(Int8Linear(w.t(), b) for w, b in zip(w1_EDF, b1_EF))
        self.fc2 = nn.ModuleList(Int8Linear(w.t(), b) for w, b in zip(w2_EFD, b2_ED))

    def share(self, dtype):
        return SimpleNamespace(waits=True)

    def multiply(self, rows_ND, runs, shared, experts):
        out = []
        for e, rows_MD in zip(experts, rows_ND.split(runs.rows_per_expert)):
            if len(rows_MD):
                out.append(self.fc2[e](self.activation_fn(self.fc1[e](rows_MD))))
        return torch.cat(out) if out else rows_ND


def quantise(model):
    """Replace the linear layers and experts of a model, in place.

    Args:
        model: an ``SMoETransformer`` in evaluation mode, on the CPU, in float32.

    Raises:
        OptionError: its experts are of another kind than ``ffn``.
    """
    for _, layer in expert_layers(model):
        experts = layer.routed_block.experts
        if type(experts) is not FFNExperts:
            raise OptionError(
                "dtype int8: works with --moe-experts ffn only; use float32 or bfloat16"
            )
        layer.routed_block.experts = Int8Experts(experts)
    for module in list(model.modules()):
        if isinstance(module, MultiheadAttention):
            module._set_skip_embed_dim_check()  # else it takes the projections' weights itself
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and "gate" not in name:
                setattr(module, name, Int8Linear(child.weight, child.bias))
