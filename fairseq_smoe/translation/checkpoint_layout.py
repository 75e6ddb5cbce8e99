"""Refusing a checkpoint whose vocabulary, expert blocks or small experts are not the model's."""

import re
from copy import copy

import torch

from fairseq_smoe.checkpoints.data_record import START_ANEW
from fairseq_smoe.checkpoints.gates import describe_gates, gate_sizes
from fairseq_smoe.checkpoints.parts import is_expert_parameter
from fairseq_smoe.errors import CheckpointError, OptionError
from fairseq_smoe.moe.expert_kinds.moefied import MoefiedExperts
from fairseq_smoe.moe.experts import PADDING

_SMALL = re.compile(r"\.layers\.\d+\.fc1\.experts\.")  # dense FFNs split into small experts
_ROUTER = re.compile(r"\.experts\.router_(in|out)$")


def check_vocabulary(model, state_dict):
    """Compare the numbers of entries in the vocabularies of a checkpoint and of ``model``.

    Raises:
        CheckpointError: they differ.
    """
    for side in ("encoder", "decoder"):
        name = f"{side}.embed_tokens.weight"
        if name in state_dict:
            theirs, ours = len(state_dict[name]), len(getattr(model, side).embed_tokens.weight)
            if theirs != ours:
                raise CheckpointError(
                    f"the dictionary and the languages make {ours} entries, those of the checkpoint "
                    f"{theirs}; give the data folder and the --langs of the training, {START_ANEW}"
                )


def check_layout(model, state_dict, group=None):
    """Compare the expert blocks of a checkpoint with those of ``model``.

    Args:
        group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` over which the model's experts
            are sharded, or None.

    Raises:
        OptionError: the strata, the positions of the expert layers, or the parameters differ.
    """
    own_state = model.state_dict()
    expected, found = gate_sizes(own_state), gate_sizes(state_dict)
    for block in sorted(expected.keys() | found.keys()):
        theirs, ours = found.get(block, ()), expected.get(block, ())
        if theirs != ours:
            raise OptionError(
                f"--smoe-strata: the checkpoint has {describe_gates(theirs)} in {block}, this model "
                f"has {describe_gates(ours)}; train with the checkpoint's --smoe-strata, "
                "--moe-ffn-split, --moe-max-experts, --smoe-stacking and --moe-freq, or start in an "
                "empty --save-dir"
            )
    expected, found = expert_shapes(own_state), expert_shapes(state_dict)
    for name in filter(is_expert_parameter, expected if group else ()):
        num_experts, *rest = expected[name]
        expected[name] = (num_experts * group.size, *rest)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            options = (
                "--smoe-strata, --smoe-norm, --smoe-pass-scale, --moe-cmr, --moe-heads, "
                "--moe-gate-bias and sizes"
            )
            if _SMALL.search(name) or _ROUTER.search(name):
                options = "--moefy-dense, --moefy-experts and --moefy-select"
            raise OptionError(
                f"{name}: {found.get(name, 'missing')} in the checkpoint, "
                f"{expected.get(name, 'missing')} in this model; train with the checkpoint's "
                f"{options}, or in an empty --save-dir"
            )
    for name in (n for n in own_state if n.endswith(PADDING)):
        if not torch.equal(state_dict[name].cpu(), own_state[name].cpu()):
            raise OptionError(
                f"{name}: the checkpoint's experts have other widths than this model's; train with "
                "the checkpoint's --moe-ffn-dims or --moe-size-schedule, or in an empty --save-dir"
            )


def expert_shapes(state_dict):
    """``{name: shape}`` of every parameter of expert blocks, and of dense FFNs that are split into
    small experts."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in state_dict.items()
        if ".expert_block." in name or _SMALL.search(name)
    }


def without_needless_routers(model, state_dict):
    """The checkpoint without the routers of small experts, if ``model`` chooses without them."""
    kinds = [module for module in model.modules() if isinstance(module, MoefiedExperts)]
    if not any(experts.options.moefy_select == "oracle" for experts in kinds):
        return state_dict
    kept = copy(state_dict)  # with torch's metadata of its modules
    for name in filter(_ROUTER.search, state_dict):
        del kept[name]
    return kept
