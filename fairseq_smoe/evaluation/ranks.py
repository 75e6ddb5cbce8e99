"""Processes that torchrun has started, which share what is to be translated.

Translations go through files, which ranks write and the first one puts together. For what they have
to say to each other they use torch's store, which runs on the first rank's machine. There are no
collectives: a rank that has died holds up none of the others while they translate.
"""

import os
import socket
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from fairseq_smoe.errors import OneLineError, OptionError
from fairseq_smoe.files import write_whole

TICK = 1  # seconds between signs of life
PATIENCE = 120  # seconds without one until a rank counts as lost
# what ranks tell each other
PLAN = "plan"  # how the first rank has divided the work
SHARE_DONE = "share-done/{}"  # that this rank has written its share
END = "end"  # that the first rank has done all that is left
SAME_MISTAKE = 5  # seconds that the first rank has to meet it as well
FILE_PATIENCE = 75  # seconds until a file of another machine has to be visible; NFS takes up to 60


class LostRankError(OneLineError):
    """A rank has died or cannot be reached: names it and its machine."""


class Ranks:
    """This process and the others.

    Attributes:
        rank, size: number of this process, and how many there are.
        local_rank: its number on its machine.
    """

    def __init__(self, rank, size, local_rank, store):
        self.rank, self.size, self.local_rank, self._store = rank, size, local_rank, store
        self._count = 0
        self._sign = None
        self._seen = {}  # rank -> (last sign of life, when it came)

    @classmethod
    @contextmanager
    def of_torchrun(cls):
        """The ranks, if torchrun has started this process beside others; else None. In the block,
        the others can see that this process lives.

        Raises:
            LostRankError: the first rank's machine cannot be reached.
        """
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1" or "RANK" not in os.environ:
            yield None
            return
        import torch.distributed as dist

        rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        try:
            store, *_ = next(dist.rendezvous("env://"))
        except (RuntimeError, ValueError) as error:
            raise LostRankError(f"rank {rank}: the ranks do not find each other: {error}") from None
        ranks = cls(rank, int(size), local_rank, store)
        ranks.tell(f"machine/{rank}", socket.gethostname())
        stop = threading.Event()
        pulse = threading.Thread(target=ranks._show_life, args=(stop,), daemon=True)
        pulse.start()
        try:
            yield ranks
            if ranks.is_first:
                ranks.tell(END, "")
        except OptionError:
            ranks._fail_once()
            raise
        finally:
            ranks.hide_folder()
            stop.set()
            pulse.join(2 * TICK)

    def _fail_once(self):
        """A mistake in the command is the same for all ranks: only the first one tells it."""
        if self.is_first:
            self.tell("failed", "")
            return
        deadline = time.monotonic() + SAME_MISTAKE
        while time.monotonic() < deadline:
            if self.asked("failed") is not None:
                sys.exit(1)
            time.sleep(0.1)

    @property
    def is_first(self):
        return self.rank == 0

    @staticmethod
    def check_processes(processes):
        """
        Raises:
            OptionError: --processes is given, although torchrun starts the processes.
        """
        if processes:
            raise OptionError(
                f"--processes {processes}: torchrun starts the processes; leave it out"
            )

    def gpu(self, number, option):
        """The ``torch.device`` of this rank among ``number`` GPUs.

        Args:
            option: what to give to use none.

        Raises:
            OptionError: there are fewer.
        """
        import torch

        if self.local_rank >= number:
            raise OptionError(
                f"torchrun --nproc_per_node: local rank {self.local_rank} on "
                f"{socket.gethostname()}, which has {number} GPUs; start one process for each, or "
                f"give {option}"
            )
        return torch.device("cuda", self.local_rank)

    def tell(self, key, value):
        """Tell all ranks ``value``, a string."""
        with self._reaching_the_store():
            self._store.set(key, value)

    def ask(self, key, of=0):
        """Wait for what rank ``of`` tells.

        Raises:
            LostRankError: it has died, or cannot be reached.
        """
        while (value := self.asked(key)) is None:
            self.check_life(of)
            time.sleep(0.05)
        return value

    def asked(self, key):
        """What was told, or None."""
        with self._reaching_the_store():
            return self._store.get(key).decode() if self._store.check([key]) else None

    def count(self, number):
        """So many sentences or bytes more are done."""
        self._count += number

    def counted(self):
        """How many are done by all ranks but this one."""
        others = (rank for rank in range(self.size) if rank != self.rank)
        return sum(int(self._life(rank).partition(" ")[0] or 0) for rank in others)

    def check_life(self, rank):
        """
        Raises:
            LostRankError: that rank has shown no sign of life for a while.
        """
        life, now = self._life(rank), time.monotonic()
        if self._seen.setdefault(rank, (life, now))[0] != life:
            self._seen[rank] = life, now
        elif now - self._seen[rank][1] > PATIENCE:
            raise LostRankError(
                f"{self.name(rank)} has died or cannot be reached; the same command goes on from "
                "what is complete"
            )

    def name(self, rank):
        """``"rank 3 (node7)"``"""
        return f"rank {rank} ({self.asked(f'machine/{rank}') or 'machine unknown'})"

    def show_folder(self, folder):
        """Called by the first rank, which has the folder for itself: where all are going to write.
        It is made if need be.

        Raises:
            OptionError: it cannot be written to.
        """
        word = uuid.uuid4().hex
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(".ranks-*"):  # of a command that was killed
                old.unlink(missing_ok=True)
            self._sign = folder / f".ranks-{word}"
            write_whole(self._sign, word)
        except OSError as error:
            raise OptionError(f"{folder}: {error.strerror}; the ranks write there") from error
        self.tell("folder", str(self._sign.absolute()))

    def see_folder(self):
        """Called by the others.

        Raises:
            OptionError: this rank's machine cannot see that folder.
        """
        self.read_file(self.ask("folder"))

    def hide_folder(self):
        """Remove what :meth:`show_folder` has written."""
        if self._sign is not None:
            self._sign.unlink(missing_ok=True)

    def read_file(self, path, of=0):
        """The text of a file that another rank has written.

        Raises:
            OptionError: this machine cannot see it.
        """
        path, deadline = Path(path), time.monotonic() + FILE_PATIENCE
        while True:
            try:
                os.scandir(path.parent).close()  # network file systems then look anew
                return path.read_text(encoding="utf-8")
            except OSError as error:
                reason = error.strerror
            if time.monotonic() > deadline or not path.parent.is_dir():
                raise OptionError(
                    f"{path}: {self.name(self.rank)} cannot see this file ({reason}), which "
                    f"{self.name(of)} has written; use a folder that all machines share"
                )
            time.sleep(0.5)

    def _life(self, rank):
        return self.asked(f"life/{rank}") or ""

    def _show_life(self, stop):
        beat = 0
        while not stop.wait(TICK if beat else 0):
            beat += 1
            try:
                self._store.set(f"life/{self.rank}", f"{self._count} {beat}")
            except RuntimeError:
                if not stop.is_set():  # left behind by a torchrun that was killed
                    os._exit(1)

    @contextmanager
    def _reaching_the_store(self):
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank}: the machine of rank 0, where the processes meet, cannot be "
                "reached; the same command goes on from what is complete"
            ) from error
