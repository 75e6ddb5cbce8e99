"""The configuration and the parameters of a model for Hugging Face transformers.

Without experts it is M2M-100, whose classes compute the same numbers as fairseq's transformer with
pre-norm layers, sinusoidal positions and one embedding. With experts it is M2M-100 with the layers
of ``travelling/modeling_smoe.py``. The classes of NLLB-MoE would not do: from transformers 5.0 on
they apply experts 0 and 1 to all tokens, whatever the router says.
"""

from fairseq_smoe.errors import OptionError
from fairseq_smoe.export.parameter_names import OTHERWISE, require_known
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts
from fairseq_smoe.moe.gates.top_k import TopKGate
from fairseq_smoe.translation.layers import ExpertLayerMixin

FLAG = "--format transformers"
ACTIVATIONS = {
    "relu": "relu",
    "relu_squared": "relu2",
    "gelu": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
    "swish": "silu",
}
SIDES = ("encoder", "decoder")


def configuration(model, options, dictionary):
    """The contents of ``config.json``.

    Args:
        model: ``SMoETransformer`` in evaluation mode.
        options: its options.
        dictionary: fairseq's, of source and target.

    Raises:
        OptionError: the classes cannot compute what this model does.
    """
    _check_parts(model, options)
    require_known(model, FLAG, ("embed_tokens", "output_projection"))
    encoder, decoder = model.encoder.layers, model.decoder.layers
    dense = {side: _dense_width(model, side) for side in SIDES}
    experts = _expert_options(model, options)
    dropped = {"dropout": options.dropout, "attention_dropout": options.attention_dropout}
    dropped["activation_dropout"] = float(options.activation_dropout or options.relu_dropout or 0)
    return {
        **(_expert_classes() if experts else _dense_classes()),
        "vocab_size": len(dictionary),
        "d_model": model.encoder.embed_tokens.embedding_dim,
        "encoder_layers": len(encoder),
        "decoder_layers": len(decoder),
        "encoder_attention_heads": encoder[0].self_attn.num_heads,
        "decoder_attention_heads": decoder[0].self_attn.num_heads,
        "encoder_ffn_dim": dense["encoder"],
        "decoder_ffn_dim": dense["decoder"],
        "activation_function": ACTIVATIONS[options.activation_fn],
        **{name: float(value) for name, value in dropped.items()},
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "scale_embedding": not options.no_scale_embedding,
        "max_position_embeddings": max(
            model.encoder.max_positions(), model.decoder.max_positions()
        ),
        "bos_token_id": dictionary.bos(),
        "pad_token_id": dictionary.pad(),
        "eos_token_id": dictionary.eos(),
        "decoder_start_token_id": dictionary.eos(),
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **experts,
    }


def parameters(model):
    """``{name: tensor}`` by the names of transformers, each with memory of its own.

    Args:
        model: one that has a :func:`configuration`.
    """
    found = {"model.shared.weight": model.encoder.embed_tokens.weight}
    tied = {id(found["model.shared.weight"])}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if id(tensor) in tied:
            continue
        found["model." + name.replace(".logit_bias", ".bias")] = tensor
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in found.items()}


def _check_parts(model, options):
    encoder, decoder = model.encoder, model.decoder
    embedding = encoder.embed_tokens.weight
    layers = [*encoder.layers, *decoder.layers]
    widths = {side.embed_tokens.embedding_dim for side in (encoder, decoder)}
    wrong = (
        (
            options.activation_fn not in ACTIVATIONS,
            f"does not know --activation-fn {options.activation_fn}",
        ),
        (
            not all(layer.normalize_before for layer in layers)
            or encoder.layer_norm is None
            or decoder.layer_norm is None,
            "expects LayerNorms in front of sublayers and behind the last layer, not --post-norm",
        ),
        (
            decoder.embed_tokens.weight is not embedding
            or getattr(decoder.output_projection, "weight", None) is not embedding,
            "expects one embedding for source, target and output (--share-all-embeddings)",
        ),
        (
            encoder.layernorm_embedding is not None or decoder.layernorm_embedding is not None,
            "does not know --layernorm-embedding",
        ),
        (
            any(not _is_sinusoidal(side.embed_positions) for side in (encoder, decoder)),
            "expects sinusoidal positions, not learned ones or none",
        ),
        (
            len(widths) > 1 or decoder.project_in_dim is not None,
            "expects the same width in encoder and decoder",
        ),
        (decoder.adaptive_softmax is not None, "does not know --adaptive-softmax-cutoff"),
        (
            decoder.cross_self_attention
            or any(layer.encoder_attn is None for layer in decoder.layers),
            "expects self-attention and attention to the source as two sublayers",
        ),
        (options.moefy_dense, "does not know --moefy-dense"),
    )
    for is_wrong, message in wrong:
        if is_wrong:
            raise OptionError(f"{FLAG}: {message}; {OTHERWISE}")


def _is_sinusoidal(positions):
    from fairseq.modules import SinusoidalPositionalEmbedding

    return isinstance(positions, SinusoidalPositionalEmbedding)


def _dense_width(model, side):
    """Hidden width of the dense layers of a side; of one without, that which they would have."""
    for layer in getattr(model, side).layers:
        if not isinstance(layer, ExpertLayerMixin):
            return layer.fc1.out_features
    return model.encoder.embed_tokens.embedding_dim


def _expert_layers(model, side):
    layers = enumerate(getattr(model, side).layers)
    return {i: layer for i, layer in layers if isinstance(layer, ExpertLayerMixin)}


def _expert_options(model, options):
    """What the configuration has to say of the experts; nothing for a dense model."""
    layers = {side: _expert_layers(model, side) for side in SIDES}
    blocks = [layer.expert_block for own in layers.values() for layer in own.values()]
    if not blocks:
        return {}
    for block in blocks:
        _check_block(block, options)
    widths = {block.experts.fc1_weight.shape[-1] for block in blocks}
    if len(widths) > 1:
        raise OptionError(
            f"{FLAG}: expects experts of the same width in encoder and decoder, not "
            f"{' and '.join(map(str, sorted(widths)))}; {OTHERWISE}"
        )
    block = blocks[0]
    return {
        "strata": list(block.strata),
        "experts_per_token": 1 if options.moe_top1_expert else 2,
        "expert_norm": block.norm,
        "expert_layers": {side: list(own) for side, own in layers.items()},
        "expert_dim": widths.pop(),
        "gate_bias": block.gates[0].logit_bias is not None,
        "output_scale": 1 - block.eom,
        "pass_scale": block.pass_scale is not None,
    }


def _check_block(block, options):
    gates = {type(gate) for gate in block.gates} if hasattr(block, "gates") else {None}
    wrong = (
        (
            type(block) is not SMoEBlock,
            "knows a single block with experts in strata in a layer, not CMR, stacking, heads or "
            f"another arrangement (--moe-arrangement {options.moe_arrangement})",
        ),
        (gates != {TopKGate}, f"knows --moe-gate top-k, not {options.moe_gate}"),
        (
            type(getattr(block, "experts", None)) is not FFNExperts,
            f"knows --moe-experts ffn, not {options.moe_experts}",
        ),
    )
    for is_wrong, message in wrong:
        if is_wrong:
            raise OptionError(f"{FLAG}: {message}; {OTHERWISE}")


def _dense_classes():
    return {"architectures": ["M2M100ForConditionalGeneration"], "model_type": "m2m_100"}


def _expert_classes():
    return {
        "architectures": ["SMoEForConditionalGeneration"],
        "model_type": "smoe",
        "auto_map": {
            "AutoConfig": "modeling_smoe.SMoEConfig",
            "AutoModelForSeq2SeqLM": "modeling_smoe.SMoEForConditionalGeneration",
        },
    }
