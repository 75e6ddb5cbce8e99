"""Running jobs on a Dask cluster, whose workers see the same files."""

import logging
import shutil
import socket
import time
import uuid
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole
from fairseq_smoe.preparation.pool import Pool, collect

SLURM = "slurm"
SLURM_MEMORY = "8GB"  # of a worker; SentencePiece needs most, 5 GB for a million lines
DASK_LOGGERS = ("distributed", "distributed.client", "distributed.utils")
CONNECT_SECONDS = 20
# a file that another machine has made may be seen late on a network file system
VISIBLE_SECONDS = 30


@contextmanager
def open_cluster(scheduler, workers, folder):
    """A :class:`ClusterPool`.

    Args:
        scheduler: address of a scheduler, or "slurm": workers are then submitted as jobs, as
            dask-jobqueue is set up to.
        workers: number of workers to ask SLURM for.
        folder: one that all workers have to see.

    Raises:
        OptionError: dask is not installed, or there is no scheduler.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise OptionError(
            f'--scheduler {scheduler}: needs dask; pip install "fairseq-smoe[cluster]"'
        ) from error
    # a lost connection is reported in one line, see ClusterPool
    for name in (*DASK_LOGGERS, "tornado.application", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _cluster(scheduler, workers) as address:
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise OptionError(
                f"--scheduler {scheduler}: no scheduler answers there "
                f"({' '.join(str(error).split())}); start one with: dask scheduler"
            ) from error
        sign = folder / f"cluster-{uuid.uuid4().hex}"
        write_whole(sign, "workers look for this file\n")
        try:
            yield ClusterPool(client, scheduler, sign)
        finally:
            sign.unlink(missing_ok=True)
            client.close(timeout=2)


@contextmanager
def _cluster(scheduler, workers):
    """The address of a scheduler, or the cluster itself."""
    if scheduler != SLURM:
        yield scheduler
        return
    try:
        import dask
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise OptionError(
            '--scheduler slurm: needs dask-jobqueue; pip install "fairseq-smoe[cluster]"'
        ) from error
    if shutil.which("sbatch") is None:
        raise OptionError(
            "--scheduler slurm: there is no sbatch here; run this on a node that may submit jobs, "
            "or give the address of a scheduler"
        )
    # a job of SLURM for each worker of one thread, unless the user's configuration says otherwise
    usual = {"cores": 1, "processes": 1, "memory": SLURM_MEMORY}
    own = {name: dask.config.get(f"jobqueue.slurm.{name}", None) for name in usual}
    try:
        cluster = SLURMCluster(**{name: own[name] or usual[name] for name in usual})
    except (ValueError, RuntimeError) as error:
        raise OptionError(
            f"--scheduler slurm: {' '.join(str(error).split())}; see jobqueue: slurm: in "
            "~/.config/dask/jobqueue.yaml"
        ) from error
    with cluster:
        cluster.scale(n=workers)
        yield cluster


class ClusterPool(Pool):
    """As :class:`~fairseq_smoe.preparation.pool.ProcessPool`, on a cluster.

    Args:
        client: of Dask.
        scheduler: value of --scheduler, for messages.
        sign: a file that every worker has to see.
    """

    def __init__(self, client, scheduler, sign):
        super().__init__()
        self.client = client
        self.scheduler = scheduler
        self.sign = sign

    def map(self, function, jobs, title, unit):
        """As of :class:`~fairseq_smoe.preparation.pool.ProcessPool`. The jobs of a worker that is
        lost are run again by others."""
        jobs = list(jobs)
        with self._part(title, unit, len(jobs)) as bar:
            return self._run(function, jobs, title, bar)

    def run(self, function, *arguments):
        """``function(*arguments)`` on a worker."""
        title = function.__name__
        with self._part(title, "call", 1, hide=True) as bar:
            (result,) = self._run(function, [arguments], title, bar)
        return result

    def _run(self, function, jobs, title, bar):
        from distributed import KilledWorker

        if not jobs:
            return []
        if not self.client.scheduler_info()["workers"]:
            where = "; see squeue --me and slurm-*.out" if self.scheduler == SLURM else ""
            tqdm.write(
                f"{title}: no workers yet at --scheduler {self.scheduler}; waiting for them{where}"
            )
        # jobs write files, and so are never the same job to Dask
        with self.client.get_executor(pure=False) as executor:
            try:
                run = partial(executor.submit, on_worker, self.sign, VISIBLE_SECONDS, function)
                return collect(list(map(run, jobs)), bar)
            except KilledWorker as error:
                raise OptionError(
                    f"--scheduler {self.scheduler}: several workers died one after another at "
                    f"work on the same job of {title!r}, probably for lack of memory; give them "
                    "more and run the same command again"
                ) from error
            except CancelledError as error:
                raise OptionError(
                    f"--scheduler {self.scheduler}: the connection was lost at {title!r}; start "
                    "the scheduler and its workers again and run the same command, which goes on "
                    "from what is complete"
                ) from error
            finally:
                executor.shutdown(wait=False)


def on_worker(sign, seconds, function, job):
    """Run a job on a worker.

    Args:
        sign: a file that the command has made.
        seconds: how long to wait for it.

    Raises:
        OptionError: the worker does not see it.
    """
    deadline = time.monotonic() + seconds
    while not sign.exists():
        if time.monotonic() > deadline:
            raise OptionError(
                f"--to {sign.parent.parent}: the worker on {socket.gethostname()} does not see "
                "this folder; choose one on a file system that all workers share"
            )
        time.sleep(0.5)
    return function(*job)
