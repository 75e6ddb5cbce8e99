"""Naming the ranks that have died or cannot be reached."""

import queue
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

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


def sign_in():
    """Tell the other ranks the name of this rank's machine. Every rank has to call this."""
    _store().set(f"machine/{dist.get_rank()}", socket.gethostname())


def is_lost_connection(error):
    """Whether an exception means that another rank does not respond."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def roll_call(patience=PATIENCE):
    """Find out after a failure which ranks are lost.

    Every rank that notices the failure calls this. Ranks that do not call it are lost. The ranks
    communicate through torch's store, on the machine of rank 0.

    Args:
        patience: seconds to wait for the other ranks; for the store itself, twice as long.

    Returns:
        A sentence that names the lost ranks.
    """
    found = queue.SimpleQueue()
    # if the store's machine is cut off, some of its functions never return
    threading.Thread(target=lambda: found.put(_find_lost(patience)), daemon=True).start()
    me = f"rank {dist.get_rank()}"
    try:
        lost = found.get(timeout=2 * patience)
    except queue.Empty:
        lost = None
    if lost is None:
        return f"{me}: the machine of rank 0, where the processes meet, cannot be reached"
    if not lost:
        return f"{me}: a connection between processes failed, although all of them respond"
    verb = "has" if len(lost) == 1 else "have"
    return f"{me}: {', '.join(lost)} {verb} died or cannot be reached"


def _find_lost(patience):
    """Names of the ranks that do not respond; None if the store cannot be reached."""
    deadline = time.monotonic() + patience
    try:
        store = _store()
        store.set_timeout(timedelta(seconds=patience))
        store.set(f"present/{dist.get_rank()}", "")
        lost = [r for r in range(dist.get_world_size()) if not _is_present(store, r, deadline)]
        return [f"rank {rank} ({_machine(store, rank)})" for rank in lost]
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
