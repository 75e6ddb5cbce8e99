"""The parameters of a transformer that other runtimes have a place for.

A part that an exporter overlooks would change the translations without an error: so that every
parameter has to be among these.
"""

from fairseq_smoe.errors import OptionError

OTHERWISE = "use 'translate' and 'serve' for this model"
ATTENTION = {
    f"{name}.{part}_proj"
    for name in ("self_attn", "encoder_attn")
    for part in ("q", "k", "v", "out")
}
IN_LAYER = {
    *ATTENTION,
    *("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm", "fc1", "fc2"),
}


def require_known(model, flag, other_parts):
    """Check that a model has no other parameters.

    Args:
        flag: of the format, for messages.
        other_parts: of encoder and decoder, besides layers and the last LayerNorm.

    Raises:
        OptionError: names the first other parameter.
    """
    for name, _ in model.named_parameters(remove_duplicate=False):
        side, part, *inner = name.split(".")
        known = part in ("layer_norm", *other_parts)
        if part == "layers":
            known = inner[1] == "expert_block" or ".".join(inner[1:-1]) in IN_LAYER
        if not known:
            raise OptionError(f"{flag}: has no place for the parameter {name}; {OTHERWISE}")
