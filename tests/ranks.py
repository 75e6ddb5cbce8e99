"""Functions run in several processes that talk to each other by gloo, and those of torchrun."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, world_size, *args):
    """``function(rank, *args)`` in every one of ``world_size`` processes.

    It has to be a function of a module. A failure on any rank fails the test, with that rank's
    traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        # forks of a process that has imported torch, and nothing else of this one's
        multiprocessing.set_forkserver_preload(["torch"])
        arguments = (function, world_size, store, args)
        mp.start_processes(_run, arguments, nprocs=world_size, start_method="forkserver")


def _run(rank, function, world_size, store, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def ranks_of(torchrun):
    """``{local rank: process id}`` of the processes that a ``torchrun`` has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(
                v.split("=", 1) for v in path.read_bytes().decode().split("\0") if "=" in v
            )
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == torchrun and "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = int(path.parent.name)
    return found
