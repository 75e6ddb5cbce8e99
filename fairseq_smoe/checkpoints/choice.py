"""Which checkpoint to go on from, where the one that is asked for is damaged."""

from pathlib import Path

from fairseq_smoe.checkpoints.parts import read_checkpoint
from fairseq_smoe.errors import CheckpointError


def newest_whole(path):
    """The path itself, if that checkpoint is whole or not there; else the one of its folder that is
    whole and has made the most updates.

    Raises:
        CheckpointError: there is none.
    """
    if not Path(path).exists() or _updates(path) is not None:
        return str(path)
    others = {other: _updates(other) for other in Path(path).parent.glob("checkpoint*.pt")}
    whole = {other: updates for other, updates in others.items() if updates is not None}
    if not whole:
        raise CheckpointError(
            f"--restore-fallback: neither {path} nor another checkpoint in its folder is whole; "
            "start in an empty --save-dir"
        )
    return str(max(whole, key=whole.get))


def _updates(path):
    """Updates that a checkpoint has made; None for one that is damaged."""
    try:
        return read_checkpoint(path)["optimizer_history"][-1]["num_updates"]
    except (CheckpointError, KeyError, IndexError, TypeError):
        return None
