"""The feed-forward networks that are split, and what is written in their place.

Letters in names: D model dim, F hidden dim, E experts of a block, P small experts of a network.
"""

from dataclasses import dataclass
from typing import Optional

import torch

from fairseq_smoe.conversion.source import Sublayer
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.small_counts import check_split, number_kept, usual_number


@dataclass(frozen=True)
class FFN:
    """A network: a dense one, or one expert of a block.

    Attributes:
        sublayer: :class:`~fairseq_smoe.conversion.source.Sublayer`
        expert: its number in the block, or None.
        hidden_dim: F.
    """

    sublayer: Sublayer
    expert: Optional[int]
    hidden_dim: int

    @property
    def name(self):
        """``decoder.layers.1``, with the expert's number from 1 for people."""
        if self.expert is None:
            return self.sublayer.layer
        return f"{self.sublayer.layer} expert {self.expert + 1}"

    @property
    def module(self):
        """Name of the module whose input are the tokens, in the model."""
        return f"{self.sublayer.name}.{'fc1' if self.expert is None else 'experts'}"

    def first_layer(self, source):
        """Weight (F, D) and bias (F,) of the first layer, in float32."""
        if self.expert is None:
            weight, bias = (source.take(f"{self.module}.{name}") for name in ("weight", "bias"))
            return weight.float(), bias.float()
        weight, bias = (
            source.parameters[f"{self.module}.fc1_{name}"][self.expert : self.expert + 1]
            for name in ("weight", "bias")
        )
        return weight[0].float().t().contiguous(), bias[0].float()


def find_ffns(source, layers):
    """The networks to split, encoder first.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`
        layers: of "dense" and "experts"; None for both, as far as there are any.

    Raises:
        OptionError: the model has none of what is asked for.
    """
    options = source.options
    activation = str(options.activation_fn)
    if activation != "relu":
        raise OptionError(
            f"{source.path}: its --activation-fn {activation} makes no hidden unit exactly zero; "
            "train it on for some hundred updates with --finetune-from-model and --activation-fn "
            "relu, and convert that"
        )
    dense, blocks = source.dense_ffns(), source.blocks()
    if layers and "dense" in layers and not dense:
        raise OptionError(f"--layers {','.join(layers)}: the model has no dense layers")
    if layers and "experts" in layers and not blocks:
        raise OptionError(f"--layers {','.join(layers)}: the model has no experts; give dense")
    if blocks and options.moe_experts != "ffn":
        if not dense or layers and "experts" in layers:
            raise OptionError(
                f"--layers experts: the experts of {source.path} are of --moe-experts "
                f"{options.moe_experts}; only those of kind ffn can be split"
            )
        blocks = []
    found = []
    if not layers or "dense" in layers:
        found += [FFN(s, None, len(source.parameters[f"{s.name}.fc1.bias"])) for s in dense]
    for block in blocks if not layers or "experts" in layers else ():
        number, hidden_dim = source.parameters[f"{block.name}.experts.fc1_bias"].shape
        found += [FFN(block, e, hidden_dim) for e in range(number)]
    return sorted(found, key=lambda ffn: (ffn.sublayer.side != "encoder", ffn.sublayer.index))


def numbers(ffns, num_experts, kept):
    """Check how many small experts are asked for.

    Args:
        num_experts: of each network; None for a usual number.
        kept: value of --moefy-k.

    Returns:
        ``(small experts of each network, how many a token keeps)``

    Raises:
        OptionError: a network cannot be split so, or fewer are there than are to be kept.
    """
    hidden_dims = sorted({ffn.hidden_dim for ffn in ffns})
    num_experts = num_experts or usual_number(hidden_dims)
    for hidden_dim in hidden_dims:
        check_split(num_experts, hidden_dim)
    return num_experts, number_kept(kept, num_experts)


def replace_parameters(source, ffns, fitted):
    """Put the split networks in the place of those of ``source``.

    Args:
        ffns: list of :class:`FFN`
        fitted: for each of them ``{"order": (F,) its hidden units, those of a small expert
            together; "router": {name: tensor}}``
    """
    results = dict(zip(ffns, fitted))
    for sublayer in dict.fromkeys(ffn.sublayer for ffn in ffns):
        own = [ffn for ffn in ffns if ffn.sublayer == sublayer]
        order_EF = torch.stack([results[ffn]["order"] for ffn in own])
        if own[0].expert is None:
            new = _split_dense(source, sublayer.name, order_EF[0])
            target = f"{sublayer.name}.fc1.experts"
        else:
            target = f"{sublayer.name}.experts"
            new = _split_experts(source, target, order_EF)
        for name in results[own[0]]["router"]:
            router_E = torch.stack([results[ffn]["router"][name] for ffn in own])
            new[name] = router_E.to(new["fc1_weight"].dtype)
        source.parameters.update({f"{target}.{name}": tensor for name, tensor in new.items()})


def _split_dense(source, layer, order_F):
    w1_FD, b1_F, w2_DF, b2_D = (
        source.parameters.pop(f"{layer}.{name}")
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    )
    return {
        "fc1_weight": w1_FD[order_F].unsqueeze(0),
        "fc1_bias": b1_F[order_F].unsqueeze(0),
        "fc2_weight": w2_DF[:, order_F].t().contiguous().unsqueeze(0),
        "fc2_bias": b2_D.clone().unsqueeze(0),
    }


def _split_experts(source, experts, order_EF):
    w1_EDF, b1_EF, w2_EFD, b2_ED = (
        source.take(f"{experts}.{name}")
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    )
    each = range(len(order_EF))
    return {
        "fc1_weight": torch.stack([w1_EDF[e].t()[order_EF[e]] for e in each]),
        "fc1_bias": b1_EF.gather(1, order_EF),
        "fc2_weight": torch.stack([w2_EFD[e][order_EF[e]] for e in each]),
        "fc2_bias": b2_ED.clone(),
    }
