"""Which checkpoint to go on from, where the one that is asked for is damaged."""

from pathlib import Path

from fairseq_smoe.checkpoints.parts import num_updates, read_checkpoint
from fairseq_smoe.errors import CheckpointError


def newest_whole(path):
    """The path itself, if that checkpoint is whole or not there; else the one of its folder that is
    whole and has made the most updates.

    One that has the optimizer's state comes before those that are to translate with alone.

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
    """What there is to go on from; None for a checkpoint that is damaged."""
    try:
        state = read_checkpoint(path)
    except CheckpointError:
        return None
    return bool(state.get("last_optimizer_state")), num_updates(state)
