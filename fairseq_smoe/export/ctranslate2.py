"""Dense models for CTranslate2 (https://opennmt.net/CTranslate2), by its model specification."""

import torch
from ctranslate2.converters import utils
from ctranslate2.specs import common_spec
from ctranslate2.specs.transformer_spec import TransformerSpec

from fairseq_smoe.errors import OptionError
from fairseq_smoe.export.parameter_names import require_known
from fairseq_smoe.translation.layers import expert_layers

ACTIVATIONS = {
    "relu": common_spec.Activation.RELU,
    "gelu": common_spec.Activation.GELU,
    "gelu_fast": common_spec.Activation.GELUTanh,
    "gelu_accurate": common_spec.Activation.GELUTanh,
    "swish": common_spec.Activation.SWISH,
    "linear": None,
}
# besides those of layers, which of a model's parts may have parameters
EXTRA_PARTS = ("embed_tokens", "embed_positions", "layernorm_embedding", "output_projection")


def specification(model, options, dictionary):
    """The ``TransformerSpec`` of a model, ready to be saved.

    Args:
        model: ``SMoETransformer`` without experts, in evaluation mode, in float32, on the CPU.
        options: its options.
        dictionary: fairseq's, of source and target.

    Raises:
        OptionError: the model has parts that CTranslate2 does not know.
    """
    _check(model, options)
    encoder, decoder = model.encoder, model.decoder
    spec = TransformerSpec.from_config(
        (len(encoder.layers), len(decoder.layers)),
        decoder.layers[0].self_attn.num_heads,
        pre_norm=decoder.layers[0].normalize_before,
        no_final_norm=decoder.layer_norm is None,
        activation=ACTIVATIONS[options.activation_fn],
        layernorm_embedding=decoder.layernorm_embedding is not None,
    )
    with torch.no_grad():
        _set_side(spec.encoder, encoder)
        _set_side(spec.decoder, decoder)
        _set_linear(spec.decoder.projection, decoder.output_projection)
    words = ["<blank>" if word == "<pad>" else word for word in dictionary.symbols]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.decoder_start_token = dictionary.eos_word
    spec.config.add_source_eos = True
    spec.validate()
    return spec


def _check(model, options):
    if expert_layers(model):
        raise OptionError(
            "--format ctranslate2: knows dense models only, and this one has experts; use "
            "'translate' and 'serve', or --format transformers"
        )
    if ACTIVATIONS.get(options.activation_fn) is None:
        raise OptionError(
            f"--format ctranslate2: does not know --activation-fn {options.activation_fn}"
        )
    require_known(model, "--format ctranslate2", EXTRA_PARTS)
    sides = model.encoder, model.decoder
    first = [side.layers[0] for side in sides]
    if (
        any(side.embed_positions is None for side in sides)
        or len({layer.self_attn.num_heads for layer in first}) > 1
        or len({layer.normalize_before for layer in first}) > 1
        or len({side.embed_tokens.embedding_dim for side in sides}) > 1
        or model.decoder.adaptive_softmax is not None
        or model.decoder.cross_self_attention
        or model.decoder.project_in_dim is not None
        or model.decoder.layers[0].encoder_attn is None
    ):
        raise OptionError(
            "--format ctranslate2: expects positions, attention to the source, and the same heads, "
            "widths and norms in encoder and decoder"
        )


def _set_side(spec, module):
    positions = module.embed_positions
    table = positions.weight if isinstance(positions, torch.nn.Embedding) else positions.weights
    spec.position_encodings.encodings = table[positions.padding_idx + 1 :].numpy()
    embeddings = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    embeddings.weight = module.embed_tokens.weight.numpy()
    spec.scale_embeddings = module.embed_scale
    for name in ("layer_norm", "layernorm_embedding"):
        if getattr(module, name) is not None:
            _set_norm(getattr(spec, name), getattr(module, name))
    for layer_spec, layer in zip(spec.layer, module.layers):
        _set_layer(layer_spec, layer)


def _set_layer(spec, layer):
    own, source = layer.self_attn, getattr(layer, "encoder_attn", None)
    attention = spec.self_attention
    _set_linear(attention.linear[0], own.q_proj, own.k_proj, own.v_proj)
    _set_linear(attention.linear[1], own.out_proj)
    _set_norm(attention.layer_norm, layer.self_attn_layer_norm)
    if source is not None:
        attention = spec.attention
        _set_linear(attention.linear[0], source.q_proj)
        _set_linear(attention.linear[1], source.k_proj, source.v_proj)
        _set_linear(attention.linear[2], source.out_proj)
        _set_norm(attention.layer_norm, layer.encoder_attn_layer_norm)
    _set_norm(spec.ffn.layer_norm, layer.final_layer_norm)
    _set_linear(spec.ffn.linear_0, layer.fc1)
    _set_linear(spec.ffn.linear_1, layer.fc2)


def _set_linear(spec, *modules):
    parts = [spec] if len(modules) == 1 else [common_spec.LinearSpec() for _ in modules]
    for part, module in zip(parts, modules):
        part.weight = module.weight.numpy()
        if module.bias is not None:
            part.bias = module.bias.numpy()
    if len(modules) > 1:
        utils.fuse_linear(spec, parts)


def _set_norm(spec, module):
    spec.gamma, spec.beta = module.weight.numpy(), module.bias.numpy()
