"""Expert blocks in the place of the FFN sublayers of a dense model."""

from dataclasses import fields

import torch
from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.doors import build_sublayer
from fairseq_smoe.moe.strata import format_strata
from fairseq_smoe.translation.options import (
    SMoETransformerOptions,
    check_options,
    is_expert_layer,
)

NORM = "final_layer_norm"
FFN = tuple(f"{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias"))
# what would make other blocks than a conversion fills. A dense model does not use these options,
# but its training may have been given them
OF_BLOCKS = (
    *("moe_experts", "moe_gate", "moe_top1_expert", "moe_ffn_dim", "moe_ffn_split", "moe_eom"),
    *("moe_cmr", "smoe_stacking", "moe_heads", "moe_arrangement", "smoe_norm", "smoe_pass_scale"),
)


def require_plain_dense(source, kind):
    """Refuse models that have no plain dense FFN sublayers for blocks to take the place of.

    Raises:
        OptionError: the model has experts, or it normalises elsewhere than a block does.
    """
    source.require_dense(kind)
    options = source.options
    if options.post_norm or not (
        options.encoder_normalize_before and options.decoder_normalize_before
    ):
        raise OptionError(
            f"{source.path}: is a post-norm model, --post-norm; {kind} starts from one without, as "
            "expert blocks normalise their own input"
        )
    defaults = {f.name: f.default for f in fields(SMoETransformerOptions)}
    for name in OF_BLOCKS:
        value = getattr(options, name)
        if value != defaults[name]:
            raise OptionError(
                f"{source.path}: was trained with --{name.replace('_', '-')} {value}, which is for "
                f"experts; {kind} starts from a dense model whose training leaves it out"
            )
    for sublayer in source.dense_ffns():
        for name in ("ffn_layernorm.weight", "w_resid"):
            if f"{sublayer.name}.{name}" in source.parameters:
                raise OptionError(
                    f"{source.path}: {sublayer.name} has {name}, of --scale-fc or --scale-resids; "
                    f"{kind} starts from a dense model without, as expert blocks have no such thing"
                )


def layer_changes(source, moe_freq, encoder_moe_freq=None, decoder_moe_freq=None):
    """The changes of options that make every Nth layer an expert layer."""
    changes = {"moe_freq": moe_freq}
    for name, period in (
        ("encoder_moe_freq", encoder_moe_freq),
        ("decoder_moe_freq", decoder_moe_freq),
    ):
        if period is None and getattr(source.options, name) is not None:
            period = moe_freq  # the dense model's own value would override --moe-freq
        if period is not None:
            changes[name] = period
    return changes


def replace_ffns(source, fill, seed, what):
    """Put expert blocks in the place of FFN sublayers, where the options of the source, which are
    those of the new model, say so. Every LayerNorm of a block becomes that of the sublayer.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`
        fill: ``fill(block, ffn)`` fills a new block from the tensors of the dense FFN, by their
            names in :data:`FFN`.
        seed: of everything that is drawn.
        what: is being done, for the progress bar.

    Returns:
        Names of the layers.
    """
    strata = check_options(source.options)
    chosen = [s for s in source.dense_ffns() if is_expert_layer(source.options, s.side, s.index)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for sublayer in tqdm(chosen, unit="layer", desc=what, disable=None):
            _replace(source, sublayer, strata, fill)
    return [sublayer.layer for sublayer in chosen]


def _replace(source, sublayer, strata, fill):
    taken = {
        name: source.parameters.pop(f"{sublayer.name}.{name}")
        for name in (*FFN, f"{NORM}.weight", f"{NORM}.bias")
    }
    ffn_dim, embed_dim = taken["fc1.weight"].shape
    dtype = taken["fc1.weight"].dtype
    block = build_sublayer(embed_dim, ffn_dim, source.options, strata)
    block.to(torch.promote_types(dtype, torch.float32))  # noise in full precision
    for norm in block.norms:
        norm.weight.copy_(taken[f"{NORM}.weight"])
        norm.bias.copy_(taken[f"{NORM}.bias"])
    fill(block, {name: taken[name] for name in FFN})
    block.to(dtype)
    for name, value in block.state_dict().items():
        source.parameters[f"{sublayer.layer}.expert_block.{name}"] = value


def describe_layers(layers, strata):
    """A line about what has been replaced."""
    layout = format_strata(strata)
    return f"{len(layers)} FFNs became blocks of strata {layout}: {', '.join(layers)}"
