"""A description of a checkpoint, for ``checkpoint inspect``."""

import collections
import math

import torch

from fairseq_smoe.checkpoints.gates import describe_gates, gate_sizes, live_experts
from fairseq_smoe.checkpoints.parts import Parted, is_expert_parameter, read_checkpoint
from fairseq_smoe.moe.experts import PADDING

# entries of fairseq's models that are not trained
NO_PARAMETERS = (".version", "._float_tensor", PADDING)


def describe(path):
    """Describe a checkpoint: ``{name: value}`` of plain types."""
    state = read_checkpoint(path)
    model = {n: v for n, v in state["model"].items() if isinstance(v, (torch.Tensor, Parted))}
    history = (state.get("optimizer_history") or [{}])[-1]
    extra = state.get("extra_state") or {}
    sizes = gate_sizes(model)
    experts = {name: value for name, value in model.items() if is_expert_parameter(name)}
    parted = [value for value in experts.values() if isinstance(value, Parted)]
    live, options = live_experts(model), _options(state)
    small = _small_experts(options)
    return {
        "architecture": options.get("arch") or options.get("_name"),
        "experts": describe_gates(next(iter(sizes.values()), ())),
        **({"live experts": "{} of {}".format(*live)} if live else {}),
        **({"small experts": small} if small else {}),
        "expert blocks": len(sizes),
        "parameters": count_parameters(model),
        "of experts": sum(_parameters(experts).values()) - _padding(model),
        "parts": len(parted[0].tensors) if parted else 1,
        "type": _type(model),
        "updates": history.get("num_updates"),
        "epoch": (extra.get("train_iterator") or {}).get("epoch"),
        "validation loss": _number(extra.get("val_loss")),
        "best so far": _number(extra.get("best")),
        "optimizer": history.get("optimizer_name") if state.get("last_optimizer_state") else "none",
    }


def _options(state):
    """The model's options. Checkpoints of an older fairseq have a Namespace of options."""
    cfg = state.get("cfg")
    options = (cfg.get("model") if isinstance(cfg, dict) else state.get("args")) or {}
    return options if isinstance(options, dict) else vars(options)


def _small_experts(options):
    """What has been split by MoEfication; None if nothing has."""
    split = {
        "dense FFN": options.get("moefy_dense"),
        "expert": options.get("moe_experts") == "moefied",
    }
    of = " and ".join(f"every {name}" for name, done in split.items() if done)
    if not of:
        return None
    number, kept = options.get("moefy_experts"), str(options.get("moefy_k"))
    kept = "all" if kept == "0" else kept
    return f"{number} of {of}, {kept} kept ({options.get('moefy_select')})"


def count_parameters(model):
    """Number of parameters of a model, ``{name: tensor or Parted}``; shared ones count once."""
    return sum(_parameters(model).values()) - _padding(model)


def _padding(model):
    return sum(int(value.sum()) for name, value in model.items() if name.endswith(PADDING))


def _parameters(model):
    """``{address: size}`` of all parameters; those that share memory count once."""
    sizes = {}
    for name, value in model.items():
        if not name.endswith(NO_PARAMETERS):
            memory = name if isinstance(value, Parted) else (value.data_ptr(), value.shape)
            sizes[memory] = math.prod(value.shape)
    return sizes


def _type(model):
    """The dtype of most of the numbers."""
    sizes = collections.Counter()
    for value in model.values():
        tensor = value.tensors[0] if isinstance(value, Parted) else value
        sizes[str(tensor.dtype).removeprefix("torch.")] += math.prod(value.shape)
    return max(sizes, key=sizes.get, default=None)


def _number(value):
    """A number of numpy or torch as a Python number."""
    return value.item() if hasattr(value, "item") else value
