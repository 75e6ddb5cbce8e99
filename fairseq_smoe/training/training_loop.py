"""What this project puts into fairseq_cli.train, fairseq's training loop."""

from argparse import Namespace
from functools import wraps

from fairseq.tasks import TASK_REGISTRY

from fairseq_smoe.errors import CheckpointError, complaints_in_one_line
from fairseq_smoe.training.fully_sharded import check_options
from fairseq_smoe.training.trainer import SMoETrainer, StopTraining, stop_and_save


def change_train(module):
    """Replace names of ``fairseq_cli.train``."""
    module.main = _checking_files(module.main)
    module.Trainer = SMoETrainer
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


def _stopping(stock):
    """fairseq has no way to stop its loop on a signal."""

    @wraps(stock)
    def validate_and_save(cfg, trainer, task, epoch_itr, *args):
        if not isinstance(trainer, SMoETrainer):
            return stock(cfg, trainer, task, epoch_itr, *args)
        try:
            if trainer.must_stop():
                raise StopTraining
            losses, must_end = stock(cfg, trainer, task, epoch_itr, *args)
        except StopTraining:
            stop_and_save(cfg, trainer, epoch_itr)
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
