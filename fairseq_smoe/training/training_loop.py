"""What this project puts into fairseq_cli.train, fairseq's training loop."""

import logging
from argparse import Namespace
from functools import wraps
from types import SimpleNamespace

from fairseq import checkpoint_utils
from fairseq.tasks import TASK_REGISTRY

from fairseq_smoe.errors import CheckpointError, complaints_in_one_line
from fairseq_smoe.patching import Overlay
from fairseq_smoe.training.fully_sharded import check_options
from fairseq_smoe.training.steering import reason_to_end
from fairseq_smoe.training.trainer import SMoETrainer, StopTraining, stop_and_save

logger = logging.getLogger(__name__)


def change_train(module):
    """Replace names of ``fairseq_cli.train``."""
    module.main = _checking_files(module.main)
    module.Trainer = SMoETrainer
    resuming = SimpleNamespace(load_checkpoint=_resuming(module))
    module.checkpoint_utils = Overlay(module.checkpoint_utils, resuming)
    module.train = _ending(module.train)
    module.validate_and_save = _stopping(module.validate_and_save)
    module.fsdp_enable_wrap = _sharding_all_but_experts(module.fsdp_enable_wrap)


def _checking_files(stock):
    """fairseq notices missing training files only after it has built the model and loaded the
    validation sets."""

    @wraps(stock)
    def main(cfg):
        args = cfg if isinstance(cfg, Namespace) else cfg.task
        task = TASK_REGISTRY.get(getattr(args, "_name", None) or getattr(args, "task", None))
        check = getattr(task, "check_training_files", None)
        if check is None:
            return stock(cfg)
        with complaints_in_one_line():
            check(args)
            return stock(cfg)

    return main


def _resuming(module):
    """fairseq counts for --patience, and keeps the best score, in attributes of functions. They
    belong to one training, of which there may be several in a process."""

    def load_checkpoint(cfg, trainer, **kwargs):
        if not isinstance(trainer, SMoETrainer):
            return checkpoint_utils.load_checkpoint(cfg, trainer, **kwargs)
        trainer.patience = vars(module.should_stop_early)
        trainer.patience.clear()
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        extra_state, epoch_itr = checkpoint_utils.load_checkpoint(cfg, trainer, **kwargs)
        if trainer.unvalidated is not None and not cfg.reset_dataloader:
            validate_late(module, trainer, extra_state["train_iterator"])
        return extra_state, epoch_itr

    return load_checkpoint


def _ending(stock):
    """A training that is started again after its end would go on by an update, or an epoch."""

    @wraps(stock)
    def train(cfg, trainer, task, epoch_itr):
        reason = isinstance(trainer, SMoETrainer) and reason_to_end(trainer)
        if reason:
            logger.info(f"this training has ended before, because of {reason}")
            return [None], True
        return stock(cfg, trainer, task, epoch_itr)

    return train


class Position:
    """The place in the data where a training was stopped, for the functions of fairseq that save
    there."""

    def __init__(self, state, end_of_epoch):
        self.epoch = state["epoch"] - end_of_epoch  # at its end, the state is that of the next
        self.end_of_epoch = lambda: end_of_epoch
        self.state_dict = lambda: dict(state)


def validate_late(module, trainer, iterator_state):
    """Validate and save as the training would have done if it had not been asked to stop.

    Args:
        module: ``fairseq_cli.train``.
        iterator_state: position in the data, of the checkpoint.
    """
    end_of_epoch, trainer.unvalidated = trainer.unvalidated["end_of_epoch"], None
    position = Position(iterator_state, end_of_epoch)
    subsets = trainer.cfg.dataset.valid_subset.split(",")
    losses, _ = module.validate_and_save(
        trainer.cfg, trainer, trainer.task, position, subsets, end_of_epoch
    )
    if end_of_epoch:
        trainer.lr_step(position.epoch, losses[0])


def _stopping(stock):
    """fairseq has no way to stop its loop on a signal."""

    @wraps(stock)
    def validate_and_save(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
        if not isinstance(trainer, SMoETrainer):
            return stock(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        try:
            if trainer.must_stop():
                raise StopTraining
            losses, must_end = stock(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        except StopTraining:
            stop_and_save(cfg, trainer, epoch_itr, end_of_epoch)
        if must_end and trainer.unsaved:
            raise CheckpointError(
                f"the training ends without its last checkpoint: {trainer.unsaved}"
            )
        return losses, must_end

    return validate_and_save


def _sharding_all_but_experts(stock):
    @wraps(stock)
    def fsdp_enable_wrap(cfg):
        check_options(cfg)
        return stock(cfg)

    return fsdp_enable_wrap
