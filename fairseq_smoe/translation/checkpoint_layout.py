"""Refusing a checkpoint whose expert blocks differ from the model's."""

from fairseq_smoe.checkpoints.gates import describe_gates, gate_sizes
from fairseq_smoe.checkpoints.parts import is_expert_parameter
from fairseq_smoe.errors import OptionError


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
                "--smoe-stacking and --moe-freq, or start in an empty --save-dir"
            )
    expected, found = expert_shapes(own_state), expert_shapes(state_dict)
    for name in filter(is_expert_parameter, expected if group else ()):
        num_experts, *rest = expected[name]
        expected[name] = (num_experts * group.size, *rest)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise OptionError(
                f"{name}: {found.get(name, 'missing')} in the checkpoint, "
                f"{expected.get(name, 'missing')} in this model; train with the checkpoint's "
                "--smoe-strata, --smoe-norm, --moe-cmr and sizes, or in an empty --save-dir"
            )


def expert_shapes(state_dict):
    """``{name: shape}`` of every parameter of the expert blocks."""
    return {
        name: tuple(tensor.shape) for name, tensor in state_dict.items() if ".expert_block." in name
    }
