"""Naming the ranks that have died, cannot be reached, or do not run the same step."""

import queue
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

from fairseq_smoe.training.gloo_mismatch import when_sizes_differ

PATIENCE = 10  # seconds that other ranks have to notice the failure as well

# words in errors of torch's backends when a rank does not respond; few have an exception type
_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "Read timeout",
    "Socket Timeout",
    "No route to host",
    "Network is unreachable",
    "Connection timed out",
    "NCCL",
    "gloo",
)

_OUT_OF_STEP = "the processes do not run the same step of the training"


def sign_in():
    """Tell the other ranks the name of this rank's machine. Every rank has to call this."""
    _store().set(f"machine/{dist.get_rank()}", socket.gethostname())
    when_sizes_differ(_leave_word)


def _leave_word():
    """Called when gloo is about to end this process."""
    _store().set(f"mismatch/{dist.get_rank()}", "")
    print(
        f"error: rank {dist.get_rank()}: {_OUT_OF_STEP}, because another rank has sent data of "
        "another size than this one expects",
        file=sys.__stderr__,
        flush=True,
    )


def is_lost_connection(error):
    """Whether an exception means that another rank does not respond."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def place_of(error):
    """The function, outside torch, in which this process waited for others."""
    places = [
        f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}"
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    own = [place for place in places if not place.startswith("torch.")]
    return own[-1] if own else ""


def roll_call(place, patience=PATIENCE):
    """Find out after a failure which ranks are lost.

    Every rank that notices the failure calls this. Ranks that do not call it are lost. The ranks
    communicate through torch's store, on the machine of rank 0.

    Args:
        place: where this rank waited, from :func:`place_of`.
        patience: seconds to wait for the other ranks; for the store itself, twice as long.

    Returns:
        A sentence that names the lost ranks, or says that the ranks do not run the same step.
    """
    found = queue.SimpleQueue()
    # if the store's machine is cut off, some of its functions never return
    threading.Thread(target=lambda: found.put(_find_cause(place, patience)), daemon=True).start()
    try:
        cause = found.get(timeout=2 * patience)
    except queue.Empty:
        cause = None
    if cause is None:
        cause = "the machine of rank 0, where the processes meet, cannot be reached"
    return f"rank {dist.get_rank()}: {cause}"


def _find_cause(place, patience):
    """Why ranks do not respond; None if the store cannot be reached."""
    deadline = time.monotonic() + patience
    try:
        store = _store()
        store.set_timeout(timedelta(seconds=patience))
        store.set(f"present/{dist.get_rank()}", place)
        ranks = range(dist.get_world_size())
        if any(store.check([f"mismatch/{rank}"]) for rank in ranks):
            return f"{_OUT_OF_STEP}: they send each other data of different sizes"
        lost = [rank for rank in ranks if not _is_present(store, rank, deadline)]
        if lost:
            names = ", ".join(f"rank {rank} ({_machine(store, rank)})" for rank in lost)
            return f"{names} {'has' if len(lost) == 1 else 'have'} died or cannot be reached"
        places = [store.get(f"present/{rank}").decode() for rank in ranks]
        if len(set(places)) > 1:
            waits = ", ".join(f"rank {rank} in {place}" for rank, place in zip(ranks, places))
            return f"{_OUT_OF_STEP}: {waits}"
        return "a connection between processes failed, although all of them respond"
    except RuntimeError:
        return None


def _is_present(store, rank, deadline):
    while not store.check([f"present/{rank}"]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _machine(store, rank):
    name = f"machine/{rank}"
    return store.get(name).decode() if store.check([name]) else "machine unknown"


def _store():
    # torch has no public name for its default store
    return dist.distributed_c10d._get_default_store()
