"""Choosing where the jobs run: on this machine, or on a cluster."""

from contextlib import contextmanager

from fairseq_smoe.preparation.pool import ProcessPool


@contextmanager
def open_pool(workers, scheduler, folder):
    """What runs the jobs: a :class:`ProcessPool`, or a
    :class:`~fairseq_smoe.preparation.cluster.ClusterPool`, which has the same methods.

    Args:
        workers: number of processes.
        scheduler: None for this machine, or --scheduler.
        folder: one that all workers of a cluster have to see.
    """
    if scheduler is None:
        yield ProcessPool(workers)
        return
    from fairseq_smoe.preparation.cluster import open_cluster  # needs dask

    with open_cluster(scheduler, workers, folder) as pool:
        yield pool
