"""The parts of a checkpoint that hold the experts, where several processes share them.

A checkpoint is one file, ``checkpoint_last.pt``, in fairseq's format. Where R ranks share the
experts, it holds all but those and names a folder beside it, in which every rank has written its
own: ``experts-UPDATES-NUMBER/part-r-of-R.pt``. Part r has the experts r, r + R, r + 2R, ... of
every block, and what the optimizer keeps of them. Copies of the file name the same folder.

A part is ``{"model": {parameter: (E / R, ...)}, "optimizer": {number: {name: (E / R, ...)}}}``,
where a number is that of a parameter in the optimizer's state.
"""

import re
import secrets
import shutil
import zipfile
from copy import copy
from pathlib import Path

import torch

from fairseq_smoe.checkpoints import files
from fairseq_smoe.errors import CheckpointError

REFERENCE = "expert_parts"  # in the checkpoint: {"folder": name, "parts": R}
NAMES = "trained_parameters"  # in the checkpoint: names, in the order of the optimizer's state
_FOLDER_NAME = re.compile(r"experts-\d+-[0-9a-f]+")
_EXPERT_PARAMETER = re.compile(r"\.expert_block\.(block\.)?experts\.fc[12]_(weight|bias)$")


def is_expert_parameter(name):
    """Whether a parameter of the model is stacked over experts."""
    return _EXPERT_PARAMETER.search(name) is not None


class Parted:
    """A tensor (E, ...) over all experts, of which every part has some entries.

    Args:
        tensors: part r of R has the entries r, r + R, r + 2R, ...
    """

    def __init__(self, tensors):
        self.tensors = tensors
        self.shape = torch.Size([sum(map(len, tensors)), *tensors[0].shape[1:]])

    def __getitem__(self, experts):
        """The entries of a slice of the experts, as a tensor of its own."""
        chosen = range(*experts.indices(len(self)))
        taken = self.tensors[0].new_empty(len(chosen), *self.shape[1:])
        for entry, e in zip(taken, chosen):
            entry.copy_(self.entry(e))
        return taken

    def entry(self, e):
        """That of one expert, as it is in the file."""
        return self.tensors[e % len(self.tensors)][e // len(self.tensors)]

    def __len__(self):
        return self.shape[0]


def read_checkpoint(path):
    """A checkpoint as fairseq wrote it; where its experts are in parts, their tensors are
    :class:`Parted`, and take no memory until they are used.

    Raises:
        CheckpointError: see :func:`~fairseq_smoe.checkpoints.files.read`; or a part is missing.
    """
    state = files.read(path)
    reference = state.pop(REFERENCE, None) if isinstance(state, dict) else None
    if reference is not None:
        parts = [files.read(part) for part in part_paths(path, reference)]
        for name in parts[0]["model"]:
            state["model"][name] = Parted([part["model"][name] for part in parts])
        optimizer = state.get("last_optimizer_state") or {"state": {}}
        for number in parts[0]["optimizer"] if optimizer["state"] else ():
            for key in parts[0]["optimizer"][number]:
                tensors = [part["optimizer"][number][key] for part in parts]
                optimizer["state"][number][key] = Parted(tensors)
    return state


def part_paths(path, reference):
    """Files of the experts of the checkpoint at ``path``.

    Raises:
        CheckpointError: not all of them are there.
    """
    folder = Path(path).parent / reference["folder"]
    paths = [folder / part_name(r, reference["parts"]) for r in range(reference["parts"])]
    missing = [part for part in paths if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{path}: its experts are in {folder}, where {missing[0].name} is missing; copy that "
            "folder along with the checkpoint, or make one file of both where they were written: "
            f"python -m fairseq_smoe checkpoint merge {path} OUTPUT"
        )
    return paths


def part_name(rank, size):
    return f"part-{rank}-of-{size}.pt"


def new_folder_name(num_updates):
    """One that no other checkpoint has, of the same update neither."""
    return f"experts-{num_updates}-{secrets.token_hex(5)}"


def take_experts(state):
    """Take all that belongs to experts out of a checkpoint's state.

    Args:
        state: loses what is taken.

    Returns:
        The content of a part.
    """
    model = {name: state["model"][name] for name in state["model"] if is_expert_parameter(name)}
    state["model"] = {n: value for n, value in state["model"].items() if n not in model}
    optimizer = {}
    kept = (state.get("last_optimizer_state") or {}).get("state", {})
    for number, name in enumerate(state[NAMES] if kept else ()):
        if is_expert_parameter(name) and number in kept:
            stacked = {k: v for k, v in kept[number].items() if is_stacked(v, len(model[name]))}
            optimizer[number] = stacked
            kept[number] = {k: v for k, v in kept[number].items() if k not in stacked}
    return {"model": model, "optimizer": optimizer}


@torch.no_grad()
def load_experts(model, state_dict, group=None):
    """Load those of a checkpoint's experts that a model holds.

    One by one, straight from the files: the memory of a second model is not needed.

    Args:
        state_dict: with tensors over all experts, or :class:`Parted`.
        group: :class:`~fairseq_smoe.expert_group.ExpertGroup` that shares the model's experts.

    Returns:
        ``state_dict`` with the model's own tensors in the place of those.
    """
    state_dict, parameters = copy(state_dict), model.state_dict()
    for name in filter(is_expert_parameter, parameters):
        value, own = state_dict.get(name), parameters[name]
        if isinstance(value, Parted):
            numbers = range(len(value))
            for entry, e in zip(own, group.share(numbers) if group else numbers):
                entry.copy_(value.entry(e))
            state_dict[name] = own
        elif value is not None and len(value) != len(own) and group is not None:
            state_dict[name] = group.share(value)
    return state_dict


def is_stacked(value, num_experts):
    """Whether something the optimizer keeps of experts has an entry for each."""
    return isinstance(value, (torch.Tensor, Parted)) and value.shape[:1] == (num_experts,)


def whole(state):
    """Make one tensor of every :class:`Parted` of a checkpoint; in place.

    Returns:
        The state.
    """
    tables = [state["model"], *(state.get("last_optimizer_state") or {}).get("state", {}).values()]
    for table in tables:
        for name, value in table.items():
            if isinstance(value, Parted):
                table[name] = value[:]
    return state


def remove_unused_folders(folder):
    """Remove the experts that no checkpoint in the folder names any more.

    Where a file that looks like a checkpoint cannot be read, nothing is removed.
    """
    present = [path for path in Path(folder).iterdir() if _FOLDER_NAME.fullmatch(path.name)]
    used = set()
    for path in Path(folder).iterdir() if present else ():
        if path.is_file() and zipfile.is_zipfile(path):  # whatever its name
            try:
                state = files.read(path, checked=False)
            except CheckpointError:
                return
            used.add(state.get(REFERENCE, {}).get("folder"))
    for path in present:
        if path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
