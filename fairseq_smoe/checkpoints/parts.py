"""The parts of a checkpoint that hold the experts, if several ranks share them.

A checkpoint is one file, ``checkpoint_last.pt``, in fairseq's format. If R ranks share the experts,
this file has everything but the experts, and names a folder beside it to which every rank has
written its own: ``experts-UPDATES-NUMBER/part-r-of-R.pt``. Part r has the experts r, r + R,
r + 2R, ... of every block and the optimizer's state of them. Copies of the file name the same
folder.

A part is ``{"model": {parameter: (E / R, ...)}, "optimizer": {number: {name: (E / R, ...)}}}``. The
number is that of a parameter in the optimizer's state. ``"place"`` is the folder and name of the
part, so that a part copied to a wrong place is detected.
"""

import logging
import re
import secrets
import shutil
from copy import copy
from functools import cache, partial
from pathlib import Path

import torch

from fairseq_smoe.checkpoints import files
from fairseq_smoe.errors import CheckpointError

logger = logging.getLogger(__name__)

REFERENCE = "expert_parts"  # in the checkpoint: {"folder": name, "parts": R}
NAMES = "trained_parameters"  # in the checkpoint: names, in the order of the optimizer's state
_PLACE = "place"  # in a part: [folder, its name]
_FOLDER_NAME = re.compile(r"experts-\d+-[0-9a-f]+")
# parameters that experts have in common are in a submodule, and have one more name
_EXPERT_PARAMETER = re.compile(r"\.expert_block\.(block\.)*experts\.[^.]+$")


def is_expert_parameter(name):
    """Whether a parameter of the model is stacked over experts."""
    return _EXPERT_PARAMETER.search(name) is not None


class Parted:
    """A tensor (E, ...) over all experts whose entries are spread over parts.

    Args:
        tensors: one per part; part r of R has the entries r, r + R, r + 2R, ...
        checks: one function per part, called before an entry of the part is used; it may raise.
    """

    def __init__(self, tensors, checks):
        self.tensors = tensors
        self._checks = checks
        self.shape = torch.Size([sum(map(len, tensors)), *tensors[0].shape[1:]])

    def __getitem__(self, experts):
        """The entries of a slice of the experts, as a tensor of its own."""
        chosen = range(*experts.indices(len(self)))
        taken = self.tensors[0].new_empty(len(chosen), *self.shape[1:])
        for entry, e in zip(taken, chosen):
            entry.copy_(self.entry(e))
        return taken

    def entry(self, e):
        """The entry of one expert, mapped from the file."""
        self._checks[e % len(self.tensors)]()
        return self.tensors[e % len(self.tensors)][e // len(self.tensors)]

    def __len__(self):
        return self.shape[0]


def read_checkpoint(path, checked=True):
    """Read a checkpoint. Experts in parts become :class:`Parted` tensors, which take no memory
    until they are used.

    Args:
        checked: whether to compare the checksums of all parts first. Otherwise those of a part are
            compared when it is used, because a rank needs only one of many parts.

    Raises:
        CheckpointError: see :func:`~fairseq_smoe.checkpoints.files.read`; or the file has no model;
            or a part is missing or belongs to another checkpoint.
    """
    state = files.read(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(
            f"{path}: holds no model; give a checkpoint that fairseq-train has written"
        )
    reference = state.pop(REFERENCE, None)
    if reference is not None:
        paths = part_paths(path, reference)
        parts = _read_parts(path, paths)
        checks = [cache(partial(files.check, part)) for part in paths]  # each once
        for check in checks if checked else ():
            check()
        for name in parts[0]["model"]:
            state["model"][name] = Parted([part["model"][name] for part in parts], checks)
        kept = (state.get("last_optimizer_state") or {}).get("state")
        for number in parts[0]["optimizer"] if kept else ():
            for key in parts[0]["optimizer"][number]:
                tensors = [part["optimizer"][number][key] for part in parts]
                kept.setdefault(number, {})[key] = Parted(tensors, checks)
    return state


def _read_parts(path, paths):
    """The parts of the checkpoint at ``path``, without comparing their checksums."""
    parts = [files.read(part, checked=False) for part in paths]
    for part, file in zip(parts, paths):
        place = part.pop(_PLACE, None)  # earlier versions wrote none
        if place not in (None, [file.parent.name, file.name]) or _shapes(part) != _shapes(parts[0]):
            raise CheckpointError(
                f"{file}: is no part of {path}, but of another checkpoint; copy the folder "
                f"{file.parent.name} once more from where the checkpoint was written"
            )
    return parts


def _shapes(part):
    if isinstance(part, dict):
        return {name: _shapes(value) for name, value in part.items()}
    return getattr(part, "shape", None)


def part_paths(path, reference):
    """The files with the experts of the checkpoint at ``path``, which may be a symbolic link.

    Raises:
        CheckpointError: not all of them are there.
    """
    beside = Path(path).parent / reference["folder"]
    folder = beside if beside.is_dir() else Path(path).resolve().parent / reference["folder"]
    paths = [folder / part_name(r, reference["parts"]) for r in range(reference["parts"])]
    missing = [part for part in paths if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{path}: its experts are in {folder}, where {missing[0].name} is missing; copy that "
            "folder along with the checkpoint, or make one file of both where they were written: "
            f"python -m fairseq_smoe checkpoint merge {path} OUTPUT"
        )
    return paths


def write_part(part, folder, rank, size):
    """Write a part: what :func:`take_experts` has taken out of a rank's state.

    Args:
        folder: of the checkpoint's parts.

    Raises:
        DiskFullError, OSError: see :func:`~fairseq_smoe.checkpoints.files.write`.
    """
    name = part_name(rank, size)
    files.write({**part, _PLACE: [Path(folder).name, name]}, Path(folder) / name)


def part_name(rank, size):
    return f"part-{rank}-of-{size}.pt"


def new_folder_name(num_updates):
    """A name that no other checkpoint has, not even one of the same update."""
    return f"experts-{num_updates}-{secrets.token_hex(5)}"


def num_updates(state):
    """Number of updates of a checkpoint, if it is recorded."""
    return (state.get("optimizer_history") or [{}])[-1].get("num_updates", 0)


def take_experts(state):
    """Take everything that belongs to experts out of a checkpoint's state.

    Args:
        state: is changed; the experts' entries are removed.

    Returns:
        The content of a part.
    """
    model = {name: state["model"][name] for name in state["model"] if is_expert_parameter(name)}
    state["model"] = copy(state["model"])  # with torch's metadata of its modules
    for name in model:
        del state["model"][name]
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
    """Load the experts that a model holds from a checkpoint.

    They are copied one by one from the files, so that no memory for a second model is needed.

    Args:
        state_dict: with tensors over all experts, or :class:`Parted`.
        group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` that shares the model's experts.

    Returns:
        ``state_dict`` with the model's own tensors in place of the experts'.
    """
    state_dict, parameters = copy(state_dict), model.state_dict()
    for name in filter(is_expert_parameter, parameters):
        value, own = state_dict.get(name), parameters[name]
        if isinstance(value, Parted):
            numbers = group.share(range(len(value))) if group else range(len(value))
            if (len(numbers), *value.shape[1:]) != own.shape:
                state_dict[name] = value[:]  # torch reports the mismatch
                continue
            for entry, e in zip(own, numbers):
                entry.copy_(value.entry(e))
            state_dict[name] = own
        elif value is not None and len(value) != len(own) and group is not None:
            state_dict[name] = group.share(value)
    return state_dict


def is_stacked(value, num_experts):
    """Whether an entry of the optimizer's state is a tensor over all experts."""
    return isinstance(value, (torch.Tensor, Parted)) and value.shape[:1] == (num_experts,)


def whole(state):
    """Replace every :class:`Parted` of a checkpoint by one tensor, in place.

    Returns:
        The state.
    """
    tables = [state["model"], *(state.get("last_optimizer_state") or {}).get("state", {}).values()]
    for table in tables:
        for name, value in table.items():
            if isinstance(value, Parted):
                table[name] = value[:]
    return state


def remove_unused_folders(folder, names=None):
    """Remove folders of experts that no checkpoint in ``folder`` refers to any more.

    If a checkpoint cannot be read, nothing is removed.

    Args:
        names: consider only these folders; None for all.
    """
    present = [path for path in Path(folder).iterdir() if _FOLDER_NAME.fullmatch(path.name)]
    unused = {path.name for path in present if names is None or path.name in names}
    for path in Path(folder).iterdir() if unused else ():
        try:
            unused.discard(named_folder(path))
        except CheckpointError as error:
            logger.warning(f"{', '.join(sorted(unused))}: kept, as {path} may need it: {error}")
            return
    for name in unused:
        shutil.rmtree(Path(folder) / name, ignore_errors=True)


def named_folder(path):
    """Name of the folder with the parts of a checkpoint.

    Returns:
        None for a checkpoint in one file, and for a file that is no checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not path.is_file() or not files.is_of_torch(path):  # whatever its name
        return None
    state = files.read(path, checked=False)
    reference = state.get(REFERENCE) if isinstance(state, dict) else None
    return None if reference is None else reference["folder"]
