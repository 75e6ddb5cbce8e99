"""Replacing the linear layers and experts of a model by others that only translate."""

from types import SimpleNamespace

import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts
from fairseq_smoe.moe.experts import Experts
from fairseq_smoe.translation.layers import expert_layers


class LinearExperts(Experts):
    """The experts of a block as linear layers, one expert after another.

    Args:
        experts: :class:`~fairseq_smoe.moe.expert_kinds.ffn.FFNExperts`
        make_linear: see :func:`replace_linears`.
    """

    name = "linear"
    Options = FFNExperts.Options

    def __init__(self, experts, make_linear):
        super().__init__(
            experts.strata,
            experts.embed_dim,
            experts.ffn_dim,
            experts.options,
            experts.activation_fn,
        )
        w1_EDF, b1_EF, w2_EFD, b2_ED = experts.stacked()
        self.fc1 = nn.ModuleList(make_linear(w.t(), b) for w, b in zip(w1_EDF, b1_EF))
        self.fc2 = nn.ModuleList(make_linear(w.t(), b) for w, b in zip(w2_EFD, b2_ED))

    def share(self, dtype):
        return SimpleNamespace(waits=True)

    def multiply(self, rows_ND, runs, shared, experts):
        out = []
        for e, rows_MD in zip(experts, rows_ND.split(runs.rows_per_expert)):
            if len(rows_MD):
                out.append(self.fc2[e](self.activation_fn(self.fc1[e](rows_MD))))
        return torch.cat(out) if out else rows_ND


def is_replaceable(experts):
    """Whether :class:`LinearExperts` can take the place of experts."""
    return type(experts) is FFNExperts and experts.group is None


def replace_linears(model, make_linear):
    """Replace the linear layers and experts of a model, in place. Gates stay, and so do experts for
    which :func:`is_replaceable` is false.

    Args:
        model: an ``SMoETransformer`` in evaluation mode.
        make_linear: ``make_linear(weight_OI, bias_O)`` returns a module that computes a linear
            layer; the bias may be None.
    """
    for _, layer in expert_layers(model):
        experts = layer.routed_block.experts
        if is_replaceable(experts):
            layer.routed_block.experts = LinearExperts(experts, make_linear)
    for module in list(model.modules()):
        if isinstance(module, MultiheadAttention):
            module._set_skip_embed_dim_check()  # else it takes the projections' weights itself
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and "gate" not in name:
                setattr(module, name, make_linear(child.weight, child.bias))
