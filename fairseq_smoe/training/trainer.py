"""fairseq's trainer, with sharded experts, checkpoints in parts, and stop signals."""

import logging
import os
import random
import shutil
import signal
import sys

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from fairseq.utils import move_to_cpu

from fairseq_smoe.checkpoints.parts import (
    NAMES,
    REFERENCE,
    is_expert_parameter,
    is_stacked,
    new_folder_name,
    take_experts,
    write_part,
)
from fairseq_smoe.errors import CheckpointError, DiskFullError, OneLineError, OptionError
from fairseq_smoe.training import changing_experts, steering
from fairseq_smoe.training.stop_signal import StopSignal
from fairseq_smoe.training.trainer_options import (
    check_options,
    choose_backend_for_dropped_layers,
    warn_without_gate_losses,
)
from fairseq_smoe.translation import layer_drop
from fairseq_smoe.translation.layers import expert_layers, find_expert_group

logger = logging.getLogger(__name__)

HALF_PRECISION = ("FP16Optimizer", "MemoryEfficientFP16Optimizer")
ADAM = {"FairseqAdam", "FairseqFusedAdam"}  # go on from each other's state
SHARDS = "num_shards"  # number of processes, stored in checkpoints with the position in the data


class StopTraining(Exception):
    """Raised during a validation, to end it."""


class SMoETrainer(Trainer):
    """Handles experts that are sharded over an
    :class:`~fairseq_smoe.moe.expert_group.ExpertGroup`: their gradients, the gradient norm, and
    their parts of checkpoints. Stops on SIGTERM and SIGUSR1."""

    def __init__(self, cfg, task, model, criterion, quantizer=None):
        self.expert_group = find_expert_group(model)
        warn_without_gate_losses(cfg, criterion, model)
        check_options(cfg, self.expert_group)
        changing_experts.check_options(cfg, model)
        # the optimizer's state then has one entry per parameter in any precision. Experts can be
        # distinguished, and checkpoints are the same on a CPU, where flattening fails
        cfg.common.fp16_no_flatten_grads = True
        # every rank reads what it needs; in fairseq, the first rank would send all of it, pickled
        cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        if layer_drop.drops_layers(model):
            choose_backend_for_dropped_layers(cfg.distributed_training)
        super().__init__(cfg, task, model, criterion, quantizer)
        self.changing = changing_experts.ChangingExperts(model, self.data_parallel_world_size)
        self.stop_signal = StopSignal()
        self.stops = 0  # number of processes that were asked to stop, summed over all processes
        self.stored_experts = None  # reference to the parts of the checkpoint being written
        self.unsaved = None  # why the last checkpoint could not be written
        self.patience = {}  # what fairseq counts for --patience: "best" and "num_runs"
        # with a stop before a validation: {"end_of_epoch": whether it was due at the end of one}
        self.unvalidated = None

    def _set_seed(self):
        super()._set_seed()
        layer_drop.begin_update(self.model, self.cfg.common.seed + self.get_num_updates())

    # ----------------------------------------------------------------------------------
    # gradients

    @property
    def model(self):
        """The model, wrapped for data-parallel training of all parameters but sharded experts."""
        if self._wrapped_model is None and self.expert_group and self.use_distributed_wrapper:
            experts = [n for n, _ in self._model.named_parameters() if is_expert_parameter(n)]
            # for torch's wrapper; fairseq's wrappers recognise experts by their mark
            torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                self._model, experts
            )
            reduce_shared = getattr(super().model, "all_reduce_grads", lambda: None)

            def reduce_all():
                reduce_shared()
                self.expert_group.average_gradients(self._experts())

            self._wrapped_model.all_reduce_grads = reduce_all
        return super().model

    def _experts(self):
        named = self._model.named_parameters()
        return [p for n, p in named if is_expert_parameter(n) and p.requires_grad]

    def clip_grad_norm(self, clip_norm):
        """Clip by the norm of the whole model's gradients, of which each rank has only a part.
        Gradients that this update is to leave out are dropped before."""
        self._drop_gradients()
        if self.expert_group is None:
            return super().clip_grad_norm(clip_norm)
        # in half precision, float32 copies of the parameters have the gradients and experts' marks
        stepped = getattr(self.optimizer, "fp32_params", None) or self.optimizer.params

        def with_experts(norm):
            gradients = [p.grad for p in stepped if hasattr(p, "expert")]
            return self.expert_group.norm_with_experts(norm, gradients, sharded=self.is_fsdp)

        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=with_experts)

    def train_step(self, samples, raise_oom=False):
        before = self.get_num_updates()
        self.changing.before_update(before + 1)
        logging_output = super().train_step(samples, raise_oom)
        if self.get_num_updates() > before:  # else gradients have overflown
            self.changing.after_update(self.get_num_updates(), self.optimizer)
        return logging_output

    def _prepare_sample(self, sample, is_dummy=False):
        sample, is_dummy = super()._prepare_sample(sample, is_dummy)
        self.changing.before_batch(counts=not is_dummy)
        return sample, is_dummy

    def _drop_gradients(self):
        """Drop the gradients of parameters that experts want this update to skip."""
        draw = random.Random(f"{self.cfg.common.seed} {self.get_num_updates()}")
        blocks = [layer.routed_block for _, layer in expert_layers(self._model)]
        skipped = {p for block in blocks for p in block.experts.skipped_by_update(draw)}
        if not skipped:
            return
        # in half precision, the optimizer has float32 copies of the parameters, and gradients of
        # its own
        copies = getattr(self.optimizer, "fp32_params", None)
        if copies is not None:
            self.optimizer._sync_fp16_grads_to_fp32()  # else clipping would make new ones
            for parameter, copy in zip(self.optimizer.fp16_params, copies):
                if parameter in skipped:
                    copy.grad = None
        for parameter in skipped:
            parameter.grad = None

    # ----------------------------------------------------------------------------------
    # checkpoints

    def _build_optimizer(self):
        super()._build_optimizer()
        self.optimizer.optimizer.register_load_state_dict_pre_hook(self._take_share)
        # fairseq has two optimizers for half precision, one of them for shards. It compares their
        # names when it loads a checkpoint, although their states are the same
        name = type(self.optimizer).__name__
        for last in (self._optim_history or [])[-1:]:
            if last["optimizer_name"] in HALF_PRECISION or {last["optimizer_name"], name} == ADAM:
                last["optimizer_name"] = name

    def _take_share(self, _, state_dict):
        """Reduce the loaded optimizer state of all experts to that of this rank's experts. Clone
        the rest, so that the checkpoint file is no longer needed.

        Raises:
            OptionError: the checkpoint was trained with other parameters frozen.
        """
        theirs = sum(len(group["params"]) for group in state_dict["param_groups"])
        ours = sum(len(group["params"]) for group in self.optimizer.optimizer.param_groups)
        if theirs != ours:
            raise OptionError(
                f"--pesc-freeze: this training changes {ours} parameter tensors, the checkpoint's "
                f"optimizer {theirs}; give the checkpoint's --pesc-freeze, or --reset-optimizer"
            )
        names = self._trained_names()
        group = self.expert_group
        for number, entries in state_dict["state"].items():
            expert = number < len(names) and is_expert_parameter(names[number])
            for key, value in entries.items():
                if expert and is_stacked(value, self._num_experts()):
                    entries[key] = (group.share(value) if group else value[:]).clone()
                elif isinstance(value, torch.Tensor):
                    entries[key] = value.clone()

    def _trained_names(self):
        return [name for name, p in self._model.named_parameters() if p.requires_grad]

    def _num_experts(self):
        size = self.expert_group.size if self.expert_group else 1
        return size * len(self._experts()[0])

    def store_experts(self, folder):
        """Write this rank's part of a checkpoint. The first rank writes the main file later.

        Every process has to call this.

        Args:
            folder: folder of the checkpoints.

        Raises:
            CheckpointError: a rank could not write its part. All parts have been removed.
        """
        if self.expert_group is None:
            return
        self.consolidate_optimizer()  # fairseq's trainer does this before every state_dict, too
        name = self.from_first_rank(new_folder_name, self.get_num_updates())
        state = self._full_state_dict()  # with fully_sharded, every rank has to take part
        group, error = self.expert_group, None
        if dist.get_rank(group.replicas) == 0:
            try:
                os.makedirs(os.path.join(folder, name), exist_ok=True)
                part = move_to_cpu(take_experts(state))
                write_part(part, os.path.join(folder, name), group.rank, group.size)
            except (OSError, DiskFullError) as failure:
                error = failure
        failed = torch.tensor(float(error is not None), device=self.device)
        dist.all_reduce(failed)
        if failed:
            if self.is_data_parallel_master:
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            raise CheckpointError(str(error or f"{folder}: another rank could not write there"))
        self.stored_experts = {"folder": name, "parts": group.size}

    def _full_state_dict(self):
        state = super().state_dict()
        state.pop("fsdp_metadata", None)  # describes shards, and checkpoints have none
        names = self.model.original_names if self.is_fsdp else self._trained_names()
        return state | {NAMES: names}

    def state_dict(self):
        state = self._full_state_dict()
        if self.stored_experts is not None:
            take_experts(state)
            state[REFERENCE] = self.stored_experts
        return state

    def save_checkpoint(self, filename, extra_state):
        if self.expert_group is not None and self.stored_experts is None:
            # fairseq tries to save the state of a single rank that has failed
            logger.error(f"{filename}: not written, because a rank has only its own experts")
            return None
        if "train_iterator" in extra_state:
            extra_state["train_iterator"][SHARDS] = self.data_parallel_world_size
        extra_state[steering.STATE] = steering.state_of(self)
        return super().save_checkpoint(filename, extra_state)

    def load_checkpoint(
        self,
        filename,
        reset_optimizer=False,
        reset_lr_scheduler=False,
        optimizer_overrides=None,
        reset_meters=False,
    ):
        """As fairseq's, but for a checkpoint of any number of processes, and with what the training
        is steered by (see :mod:`~fairseq_smoe.training.steering`)."""
        self._agree_on(filename)
        if os.path.isfile(filename) and hasattr(self.task, "check_checkpoint"):
            self.task.check_checkpoint(filename)
        extra_state = super().load_checkpoint(
            filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters
        )
        if extra_state is not None:
            steering.restore(self, extra_state, reset_optimizer, reset_lr_scheduler, reset_meters)
            # fairseq stores the number of batches of one process; all processes have had as many
            iterator, shards = extra_state["train_iterator"], self.data_parallel_world_size
            batches = iterator["iterations_in_epoch"] * iterator.get(SHARDS, shards)
            iterator["iterations_in_epoch"] = batches // shards
        return extra_state

    def from_first_rank(self, find, *args):
        """Call a function on the first rank, and return its result on all ranks."""
        found = [None]
        if self.data_parallel_rank == 0:
            try:
                found = [find(*args)]
            except OneLineError as error:
                found = [error]
        if self.data_parallel_world_size > 1:
            dist.broadcast_object_list(found, 0, device=self.device)
        if isinstance(found[0], OneLineError):
            raise found[0]
        return found[0]

    def _agree_on(self, filename):
        """Raise an error if some ranks see a checkpoint that others do not see."""
        if self.data_parallel_world_size == 1:
            return
        exists = torch.zeros(self.data_parallel_world_size, device=self.device)
        exists[self.data_parallel_rank] = os.path.isfile(filename)
        dist.all_reduce(exists)
        if 0 < exists.sum() < len(exists):
            without = exists.logical_not().nonzero().flatten().tolist()
            ranks = ", ".join(map(str, without))
            raise CheckpointError(
                f"{filename}: rank {ranks} cannot see it, others can; give a --save-dir that all "
                "machines share"
            )

    # ----------------------------------------------------------------------------------
    # ending

    def begin_epoch(self, epoch):
        self.stop_signal.listen()
        super().begin_epoch(epoch)

    def must_stop(self):
        """Whether a process has been asked to stop. All ranks give the same answer, because they
        have exchanged it in their last step."""
        if self.data_parallel_world_size == 1:
            return self.stop_signal.number > 0
        return self.stops > 0

    def _aggregate_logging_outputs(self, logging_outputs, *sums, ignore=False):
        # sent along with the numbers that fairseq sums over all processes anyway
        asked = float(self.stop_signal.number > 0)
        logging_outputs, (*sums, stops) = super()._aggregate_logging_outputs(
            logging_outputs, *sums, asked, ignore=ignore
        )
        self.stops = int(stops)
        return logging_outputs, sums

    def valid_step(self, sample, raise_oom=False):
        if self.must_stop():
            raise StopTraining
        return super().valid_step(sample, raise_oom)


def stop_and_save(cfg, trainer, epoch_itr, end_of_epoch):
    """Save a checkpoint, and end all processes with the exit code that the signal would give.

    The training that resumes from it begins with the validation that may be due now.

    Raises:
        SystemExit: always.
    """
    logger.info(f"asked to stop: saving, and ending after update {trainer.get_num_updates()}")
    trainer.unvalidated = {"end_of_epoch": end_of_epoch}
    checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
    if dist.is_initialized():
        dist.barrier()  # wait until the first rank has saved
    sys.exit(128 + (trainer.stop_signal.number or signal.SIGTERM))
