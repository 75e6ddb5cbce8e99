"""Replacements of functions that fairseq's training calls.

Each function here replaces one or more of them, and its docstring says why. :func:`apply` runs all
of them. It is called once, when the plugin is loaded.
"""

import errno
import logging
import os
import shutil
import sys
from datetime import timedelta
from functools import partial, wraps
from types import SimpleNamespace

import torch.distributed as dist

from fairseq_smoe.checkpoints import files
from fairseq_smoe.checkpoints.choice import newest_whole
from fairseq_smoe.checkpoints.parts import read_checkpoint, remove_unused_folders
from fairseq_smoe.errors import OneLineError
from fairseq_smoe.patching import Overlay, when_imported
from fairseq_smoe.training import lost_ranks

logger = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def apply():
    change_the_training_loop()
    read_checkpoints_safely()
    write_checkpoints_whole()
    go_on_when_a_checkpoint_fails()
    fall_back_to_a_whole_checkpoint()
    wait_no_longer_than_asked()


def change_the_training_loop():
    """See :mod:`~fairseq_smoe.training.training_loop`, which has to be imported after the repairs."""
    from fairseq.distributed import fully_sharded_data_parallel

    from fairseq_smoe.training.fully_sharded import FullyShardedModel
    from fairseq_smoe.training.training_loop import change_train

    when_imported("fairseq_cli.train", change_train)
    if hasattr(sys.modules["__main__"], "validate_and_save"):  # fairseq_cli.train as a program
        change_train(sys.modules["__main__"])
    # what models are wrapped in for --ddp-backend fully_sharded
    fully_sharded_data_parallel.FullyShardedDataParallel = FullyShardedModel


def read_checkpoints_safely():
    """In fairseq, torch's default and the environment decide whether a checkpoint may execute code.
    fairseq also cannot read a checkpoint in parts."""
    from fairseq import checkpoint_utils

    def load(handle, map_location=None):
        return read_checkpoint(handle.name, checked=False)

    checkpoint_utils.torch = Overlay(checkpoint_utils.torch, SimpleNamespace(load=load))


def write_checkpoints_whole():
    """fairseq tries three times to write to a full disk. It also copies into the existing
    checkpoint_last.pt, so a crash leaves that file incomplete."""
    from fairseq import checkpoint_utils

    stock_save, manager = checkpoint_utils.torch_persistent_save, checkpoint_utils.PathManager

    @wraps(stock_save)
    def save(state, filename, async_write=False):
        if async_write or manager.path_requires_pathmanager(filename):  # not a local file
            stock_save(state, filename, async_write)
        else:
            files.write(state, filename)

    def copy(source, target, overwrite=False):
        if manager.path_requires_pathmanager(target):
            return manager.copy(source, target, overwrite)
        return _copy_whole(source, target)

    checkpoint_utils.torch_persistent_save = save
    checkpoint_utils.PathManager = Overlay(manager, SimpleNamespace(copy=copy))


def _copy_whole(source, target):
    """Make a hard link, which takes no space. If that fails, copy the file atomically."""
    unfinished = f"{target}.unfinished-{os.getpid()}"
    try:
        try:
            os.link(source, unfinished)
        except OSError:  # not every file system supports links
            shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)
    finally:
        if os.path.lexists(unfinished):
            os.remove(unfinished)
    return True


def go_on_when_a_checkpoint_fails():
    """Continue training when a checkpoint cannot be written: the previous one is still there, and
    the next may fit. It is an error only at the end of the training."""
    from fairseq import checkpoint_utils

    from fairseq_smoe.training.trainer import SMoETrainer

    stock = checkpoint_utils.save_checkpoint

    @wraps(stock)
    def save_checkpoint(cfg, trainer, epoch_itr, val_loss):
        if not isinstance(trainer, SMoETrainer):
            return stock(cfg, trainer, epoch_itr, val_loss)
        best = getattr(save_checkpoint, "best", None)
        trainer.unsaved = None
        try:
            if not cfg.no_save:
                trainer.store_experts(cfg.save_dir)
            saved = stock(cfg, trainer, epoch_itr, val_loss)
            if trainer.is_data_parallel_master and not cfg.no_save:
                remove_unused_folders(cfg.save_dir)
            return saved
        except (OSError, OneLineError) as error:
            if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
                raise
            trainer.unsaved = error
            if best is None:
                vars(save_checkpoint).pop("best", None)
            else:
                save_checkpoint.best = best
            if trainer.is_data_parallel_master:
                updates = trainer.get_num_updates()
                logger.error(
                    f"no checkpoint of update {updates}, the previous one is kept: {error}"
                )
                remove_unused_folders(cfg.save_dir)
        finally:
            trainer.stored_experts = None

    checkpoint_utils.save_checkpoint = save_checkpoint


def fall_back_to_a_whole_checkpoint():
    """Implement --restore-fallback."""
    from fairseq import checkpoint_utils

    from fairseq_smoe.training.trainer import SMoETrainer

    stock = checkpoint_utils.load_checkpoint

    @wraps(stock)
    def load_checkpoint(cfg, trainer, **kwargs):
        ours = isinstance(trainer, SMoETrainer)
        if ours and getattr(trainer.cfg.task, "restore_fallback", False):
            asked = cfg.restore_file
            if asked == "checkpoint_last.pt":
                asked = os.path.join(cfg.save_dir, asked)
            found = trainer.from_first_rank(newest_whole, asked)
            if found != asked:
                logger.warning(f"--restore-fallback: {asked} is damaged, going on from {found}")
                cfg.restore_file, cfg.finetune_from_model = found, None
        return stock(cfg, trainer, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint


def wait_no_longer_than_asked():
    """Apply --distributed-timeout. Ranks also tell each other the names of their machines, so that
    error messages can name the machine of a lost rank."""
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.distributed_init

    @wraps(stock)
    def distributed_init(cfg):
        seconds = getattr(cfg.task, "distributed_timeout", None)
        waiting = {} if seconds is None else {"timeout": timedelta(seconds=seconds)}
        # fairseq makes a group for gradients and logs; torch's default timeout for it is 30 minutes
        makers = {
            name: partial(getattr(dist, name), **waiting)
            for name in ("init_process_group", "new_group")
        }
        distributed_utils.dist = Overlay(dist, SimpleNamespace(**makers))
        rank = stock(cfg)
        lost_ranks.sign_in()
        return rank

    distributed_utils.distributed_init = distributed_init
