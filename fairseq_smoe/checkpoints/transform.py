"""Making checkpoints from others: stripped, in parts, averaged."""

import contextlib
import re
import shutil
from pathlib import Path

import torch

from fairseq_smoe.checkpoints import files
from fairseq_smoe.checkpoints.data_record import DataRecord
from fairseq_smoe.checkpoints.parts import (
    NAMES,
    REFERENCE,
    Parted,
    is_expert_parameter,
    named_folder,
    new_folder_name,
    num_updates,
    read_checkpoint,
    remove_unused_folders,
    take_experts,
    whole,
    write_part,
)
from fairseq_smoe.errors import CheckpointError, OptionError

_BETWEEN = re.compile(r"checkpoint_\d+_(\d+)\.pt")
_AT_END = re.compile(r"checkpoint(\d+)\.pt")


def replace(write, state, path):
    """Write a checkpoint, and remove the experts of the one that it replaces.

    Args:
        write: ``write(state, path)``
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = None
    with contextlib.suppress(CheckpointError):  # it may be damaged
        before = named_folder(path)
    write(state, path)
    remove_unused_folders(path.parent, {before})


def stripped(state):
    """A checkpoint in one file without the optimizer's state, to translate with or to start another
    training from."""
    state.pop("last_optimizer_state", None)
    return whole(state)


def write_in_parts(state, num_parts, path):
    """Write a checkpoint with its experts in parts in a folder beside it.

    The parts are written one after another, so that only one is in memory.

    Raises:
        OptionError: the number of experts is not divisible by ``num_parts``, or the checkpoint does
            not record which parameters the optimizer's state belongs to.
        DiskFullError: the file that was there, if any, is untouched.
    """
    path = Path(path)
    experts = {len(v) for name, v in state["model"].items() if is_expert_parameter(name)}
    if not experts or num_parts < 2 or any(number % num_parts for number in experts):
        has = f"{' or '.join(map(str, sorted(experts)))} experts" if experts else "no experts"
        raise OptionError(
            f"--parts {num_parts}: expected a divisor of the number of experts, from 2; this "
            f"checkpoint has {has} in a block"
        )
    if state.get("last_optimizer_state") and NAMES not in state:
        raise OptionError(
            f"--parts {num_parts}: this checkpoint does not say what the optimizer's state belongs "
            "to, as those of older versions; strip it first, or let the training save once more"
        )
    folder = path.parent / new_folder_name(num_updates(state))
    folder.mkdir(parents=True)
    try:
        taken = take_experts(state)
        for r in range(num_parts):
            write_part(_entries(taken, slice(r, None, num_parts)), folder, r, num_parts)
        files.write(state | {REFERENCE: {"folder": folder.name, "parts": num_parts}}, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def averaged(paths):
    """A checkpoint whose parameters are the means of several. Everything else is that of the last
    one, without the optimizer's state.

    Sums are in float32 at least. Parameters that share memory still do so.

    Raises:
        OptionError: the checkpoints hold different parameters.
        CheckpointError: they were trained with different dictionaries or language tokens.
    """
    sums, state, number, first = {}, None, 0, None
    for path in paths:
        state, number = stripped(read_checkpoint(path)), number + 1
        record = DataRecord.in_task_state(state.get("task_state") or {})
        first = first or (path, record)
        if record and first[1]:
            first[1].check(record, checkpoint=first[0], data=path)
        model = _fractions(state["model"])
        if sums:
            _check_same(path, model, sums)
        for name, tensor in model.items():
            exact = torch.promote_types(tensor.dtype, torch.float32)
            sums[name] = sums[name].add_(tensor) if name in sums else tensor.to(exact, copy=True)
    if state is None:
        raise OptionError("no checkpoints to average")
    means = {}
    for name, tensor in _fractions(state["model"]).items():
        total, memory = sums.pop(name), (tensor.data_ptr(), tensor.shape)
        state["model"][name] = means.setdefault(memory, total.div_(number).to(tensor.dtype))
    return state


def _fractions(model):
    """The tensors to average: floating point only, as integers are counts or indices."""
    tensors = {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _check_same(path, model, sums):
    for name in [*sums, *model]:
        shapes = [tuple(m[name].shape) if name in m else "missing" for m in (model, sums)]
        if shapes[0] != shapes[1]:
            raise OptionError(
                f"{path}: holds other parameters than the checkpoints before it; {name} is "
                f"{shapes[0]}, not {shapes[1]}"
            )


def last_checkpoints(folder, number, epochs=False):
    """The last checkpoints of a training, oldest first.

    Args:
        epochs: take the checkpoints at ends of epochs. Otherwise those in between are taken, if
            there are any.

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
            f"--last {number}: {folder} has {len(found)} checkpoints of updates or epochs; "
            "expected a number from 1 up to that. fairseq-train keeps more with "
            "--keep-interval-updates"
        )
    return [path for _, path in found[-number:]]


def _entries(taken, experts):
    """The entries of some experts in what :func:`take_experts` has returned."""
    if isinstance(taken, dict):
        return {name: _entries(value, experts) for name, value in taken.items()}
    # torch.save would write the whole tensor that a view belongs to
    return taken[experts] if isinstance(taken, Parted) else taken[experts].clone()
