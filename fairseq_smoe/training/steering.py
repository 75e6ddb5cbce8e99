"""What a training has come to that ends or steers it, as a part of its checkpoints.

fairseq's checkpoints have the best score and the learning rate, but neither the count of
--patience, nor that of bad epochs for --lr-scheduler reduce_lr_on_plateau, nor what decides when
the loss scale grows. A resumed training would begin all these counts anew.
"""

import logging

from fairseq.optim.lr_scheduler.reduce_lr_on_plateau import ReduceLROnPlateauLRSchedule

STATE = "steering"  # in the extra_state of a checkpoint

logger = logging.getLogger(__name__)


def state_of(trainer):
    """What to store in a checkpoint; numbers and words only."""
    state = {
        "measure": _measure_of(trainer.cfg),
        "patience": {name: float(value) for name, value in trainer.patience.items()},
        "unvalidated": trainer.unvalidated,
        "loss_scaler": scaler_state(trainer.optimizer),
    }
    if isinstance(trainer.lr_scheduler, ReduceLROnPlateauLRSchedule):
        state["bad_epochs"] = trainer.lr_scheduler.lr_scheduler.num_bad_epochs
    if trainer.cfg.ema.store_ema:
        state["updates_since_ema"] = trainer.ema.update_freq_counter
    return state


def restore(trainer, extra_state, reset_optimizer, reset_lr_scheduler, reset_meters):
    """Continue from a checkpoint that has been loaded.

    Args:
        extra_state: of the checkpoint. Its best score is removed if it cannot be compared with the
            scores of this training. A checkpoint of an earlier version has no :data:`STATE`.
        reset_optimizer, reset_lr_scheduler, reset_meters: what fairseq has not restored.
    """
    state = extra_state.get(STATE, {})
    if reset_meters:
        trainer._previous_training_time = 0
    if trainer.data_parallel_world_size > 1:
        # until the first update, the processes would go by their own clocks
        trainer._cumulative_training_time = trainer._previous_training_time
    comparable = _is_comparable(trainer.cfg, state)
    if not comparable:
        extra_state.pop("best", None)
    if not (reset_optimizer or reset_meters):
        trainer.unvalidated = state.get("unvalidated")
        if comparable:
            trainer.patience.update(state.get("patience", {}))
    if reset_optimizer or not trainer.get_num_updates():  # or the checkpoint had no optimizer
        return
    restore_scaler(trainer.optimizer, state.get("loss_scaler"))
    if trainer.cfg.ema.store_ema:
        trainer.ema.update_freq_counter = state.get("updates_since_ema", 0)
    if not reset_lr_scheduler:
        _restore_lr_scheduler(trainer, extra_state, state.get("bad_epochs", 0), comparable)


def reason_to_end(trainer):
    """Why a training is over before it begins: it has resumed from its own end. None if it is not.
    All processes give the same answer."""
    cfg, updates = trainer.cfg, trainer.get_num_updates()
    if 0 < cfg.optimization.max_update <= updates:
        return f"--max-update {cfg.optimization.max_update}"
    runs = int(trainer.patience.get("num_runs", 0))
    if 0 < cfg.checkpoint.patience <= runs:
        return f"--patience {cfg.checkpoint.patience}"
    hours = trainer._previous_training_time / 3600
    if 0 < cfg.optimization.stop_time_hours < hours:
        return f"--stop-time-hours {cfg.optimization.stop_time_hours}"
    return None


def _measure_of(cfg):
    """What the best score is a score of."""
    return {
        "--best-checkpoint-metric": cfg.checkpoint.best_checkpoint_metric,
        "--maximize-best-checkpoint-metric": cfg.checkpoint.maximize_best_checkpoint_metric,
        "--valid-subset": cfg.dataset.valid_subset.split(",")[0],
    }


def _is_comparable(cfg, state):
    now = _measure_of(cfg)
    changed = [name for name, then in state.get("measure", now).items() if then != now[name]]
    if changed:
        logger.info(
            f"{', '.join(changed)}: not as before; best score and --patience begin anew with the "
            "next validation"
        )
    return not changed


def _restore_lr_scheduler(trainer, extra_state, bad_epochs, comparable):
    scheduler = trainer.lr_scheduler
    if isinstance(scheduler, ReduceLROnPlateauLRSchedule):
        scheduler.lr_scheduler.num_bad_epochs = bad_epochs
        if not comparable:
            scheduler.lr_scheduler.best = scheduler.lr_scheduler.mode_worse
    # fairseq saves at the end of an epoch before it tells the scheduler the loss
    iterator, loss = extra_state["train_iterator"], extra_state.get("val_loss")
    if comparable and iterator["iterations_in_epoch"] == 0 and loss is not None:
        trainer.lr_step(iterator["epoch"] - 1, loss)


def scaler_state(optimizer):
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return None
    if hasattr(scaler, "state_dict"):  # torch's, for --amp
        return scaler.state_dict()
    return {name: value for name, value in vars(scaler).items() if name.startswith("_")}


def restore_scaler(optimizer, state):
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not state:
        return
    if hasattr(scaler, "state_dict"):
        if "scale" in state:
            scaler.load_state_dict(state)
    elif "scale" not in state:
        vars(scaler).update(state)
