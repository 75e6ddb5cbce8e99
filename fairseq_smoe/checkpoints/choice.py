"""Which checkpoint to resume from if the requested one is damaged."""

from pathlib import Path

from fairseq_smoe.checkpoints.parts import num_updates, read_checkpoint
from fairseq_smoe.errors import CheckpointError


def newest_whole(path):
    """The checkpoint to resume from: ``path`` unless it is damaged.

    If it is, the undamaged checkpoint in its folder with the most updates. Checkpoints with an
    optimizer's state are preferred to those without. A ``path`` that does not exist is returned
    too.

    Raises:
        CheckpointError: there is none.
    """
    if not Path(path).exists() or _progress(path) is not None:
        return str(path)
    others = {other: _progress(other) for other in Path(path).parent.glob("checkpoint*.pt")}
    whole = {other: progress for other, progress in others.items() if progress is not None}
    if not whole:
        raise CheckpointError(
            f"--restore-fallback: neither {path} nor another checkpoint in its folder is whole; "
            "start in an empty --save-dir"
        )
    return str(max(whole, key=whole.get))


def _progress(path):
    """Sort key of a checkpoint; None if it is damaged."""
    try:
        state = read_checkpoint(path)
    except CheckpointError:
        return None
    return bool(state.get("last_optimizer_state")), num_updates(state)
