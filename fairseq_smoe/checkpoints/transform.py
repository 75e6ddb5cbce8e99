"""Checkpoints made of others."""

import re
from pathlib import Path

import torch

from fairseq_smoe.checkpoints import files
from fairseq_smoe.checkpoints.parts import (
    REFERENCE,
    Parted,
    is_expert_parameter,
    new_folder_name,
    part_name,
    read_checkpoint,
    take_experts,
    whole,
)
from fairseq_smoe.errors import OptionError

_BETWEEN = re.compile(r"checkpoint_\d+_(\d+)\.pt")
_AT_END = re.compile(r"checkpoint(\d+)\.pt")


def merged(state):
    """A checkpoint in one piece."""
    return whole(state)


def stripped(state):
    """A checkpoint to translate with, or to start another training from: in one piece, without
    what the optimizer keeps."""
    state.pop("last_optimizer_state", None)
    return whole(state)


def write_in_parts(state, num_parts, path):
    """Write a checkpoint whose experts are in parts in a folder beside it.

    Raises:
        OptionError: the experts cannot be shared by so many.
    """
    path = Path(path)
    state = whole(state)
    experts = [len(v) for name, v in state["model"].items() if is_expert_parameter(name)]
    if not experts or num_parts < 2 or experts[0] % num_parts:
        has = f"{experts[0]} experts" if experts else "no experts"
        raise OptionError(
            f"--parts {num_parts}: expected a divisor of the number of experts, from 2; this "
            f"checkpoint has {has} in a block"
        )
    folder = new_folder_name(state["optimizer_history"][-1]["num_updates"])
    (path.parent / folder).mkdir(parents=True)
    taken = take_experts(state)
    for r in range(num_parts):
        part = _entries(taken, slice(r, None, num_parts))
        files.write(part, path.parent / folder / part_name(r, num_parts))
    state[REFERENCE] = {"folder": folder, "parts": num_parts}
    files.write(state, path)


def averaged(paths):
    """A checkpoint whose parameters are the means of those of several; the rest, without the
    optimizer's state, is that of the last.

    Sums are in float32 at least.

    Raises:
        OptionError: the checkpoints hold different parameters.
    """
    sums, state, number = {}, None, 0
    for path in paths:
        state, number = stripped(read_checkpoint(path)), number + 1
        model = state["model"]
        shapes = {name: tensor.shape for name, tensor in model.items()}
        if sums and shapes != {name: tensor.shape for name, tensor in sums.items()}:
            raise OptionError(f"{path}: holds other parameters than the checkpoints before it")
        for name, tensor in model.items():
            exact = torch.promote_types(tensor.dtype, torch.float32)
            sums[name] = sums[name].add_(tensor) if name in sums else tensor.to(exact, copy=True)
    if state is None:
        raise OptionError("no checkpoints to average")
    for name, tensor in state["model"].items():
        state["model"][name] = sums.pop(name).div_(number).to(tensor.dtype)
    return state


def last_checkpoints(folder, number, epochs=False):
    """The last checkpoints of a training, oldest first.

    Args:
        epochs: those of ends of epochs, in the place of those in between where there are any.

    Raises:
        OptionError: there are fewer.
    """
    found = []
    for pattern in [_AT_END] if epochs else [_BETWEEN, _AT_END]:
        matches = [(pattern.fullmatch(path.name), path) for path in Path(folder).iterdir()]
        found = sorted((int(match[1]), path) for match, path in matches if match)
        if found:
            break
    if number < 1 or len(found) < number:
        raise OptionError(
            f"--last {number}: {folder} has {len(found)} checkpoints of updates or epochs; expected "
            "a number from 1 up to that. fairseq-train keeps more with --keep-interval-updates"
        )
    return [path for _, path in found[-number:]]


def _entries(taken, experts):
    """A part of what :func:`take_experts` has returned."""
    if isinstance(taken, dict):
        return {name: _entries(value, experts) for name, value in taken.items()}
    return taken[experts].clone()
