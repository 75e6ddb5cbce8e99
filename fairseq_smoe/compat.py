"""What the installed fairseq (ve-fairseq 0.12.3) and torch 2.11-2.13 need to work together.

Each function repairs one thing and says why; :func:`apply` runs them all. It is called once, when
the plugin is loaded.
"""

import argparse
import importlib.util
import os
import sys
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import torch

from fairseq_smoe.errors import OneLineError


def apply():
    allow_fairseq_checkpoints()
    let_ranks_receive_checkpoints()
    find_torchrun_processes_on_cpu()
    let_ddp_run_on_cpu()
    keep_half_precision_off_the_tpu()
    keep_the_last_batch()
    write_log_files_once()
    explain_chosen_parts_in_help()
    print_user_errors_in_one_line()


def allow_fairseq_checkpoints():
    """torch >= 2.6 unpickles only known types; fairseq's checkpoints hold an argparse.Namespace,
    and numpy numbers when a metric was computed with numpy (--eval-bleu)."""
    numbers = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            np._core.multiarray.scalar,
            np._core.multiarray._reconstruct,
            np.ndarray,
            np.dtype,
            *numbers,
        ]
    )


def let_ranks_receive_checkpoints():
    """On resume, rank 0 sends its state to the others pickled by torch.save, with configuration
    types that weights-only loading refuses. The sender is this very training, so the receiver may
    trust it; files stay restricted."""
    from fairseq.distributed import utils as distributed_utils

    trusting = SimpleNamespace(load=partial(torch.load, weights_only=False))
    distributed_utils.torch = _Overlay(torch, trusting)


class _Overlay:
    """A module with some of its attributes replaced."""

    def __init__(self, module, replacements):
        self._module = module
        self.__dict__.update(vars(replacements))

    def __getattr__(self, name):
        return getattr(self._module, name)


def find_torchrun_processes_on_cpu():
    """fairseq derives the number of processes from that of GPUs: under torchrun on a CPU every
    process would train alone, and with the number given divide by zero GPUs."""
    from fairseq.distributed import utils as distributed_utils

    stock_init = distributed_utils.infer_init_method
    stock_torchrun_init = distributed_utils._infer_torch_distributed_launch_init

    @wraps(stock_init)
    def infer_init_method(cfg, force_distributed=False):
        if _under_torchrun() and not torch.cuda.is_available():
            cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
            cfg.distributed_backend = "gloo"
        return stock_init(cfg, force_distributed)

    @wraps(stock_torchrun_init)
    def torchrun_init(cfg):
        if torch.cuda.is_available():
            return stock_torchrun_init(cfg)
        cfg.distributed_init_method = "env://"
        cfg.distributed_rank = int(os.environ["RANK"])
        cfg.device_id = 0
        cfg.distributed_no_spawn = True

    distributed_utils.infer_init_method = infer_init_method
    distributed_utils._infer_torch_distributed_launch_init = torchrun_init


def _under_torchrun():
    return all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))


def let_ddp_run_on_cpu():
    """--ddp-backend pytorch_ddp names a GPU to torch's DDP, which refuses that for CPU modules."""
    from fairseq.models import distributed_fairseq_model

    stock = distributed_fairseq_model.DistributedDataParallel

    @wraps(stock, updated=())
    def ddp(module, device_ids=None, output_device=None, **kwargs):
        if not next(module.parameters()).is_cuda:
            device_ids = output_device = None
        return stock(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = ddp


def keep_half_precision_off_the_tpu():
    """--bf16 switches fairseq to a TPU, whether there is one or not; and without a GPU, --fp16
    asks for one to flatten its gradients on."""
    from fairseq.trainer import Trainer

    stock_init = Trainer.__init__

    @wraps(stock_init)
    def init(self, cfg, *args, **kwargs):
        if importlib.util.find_spec("torch_xla") is None:
            cfg.common.tpu = False
        if cfg.common.cpu or not torch.cuda.is_available():
            cfg.common.fp16_no_flatten_grads = True
        stock_init(self, cfg, *args, **kwargs)

    Trainer.__init__ = init


def keep_the_last_batch():
    """The installed fairseq leaves out a last batch whose size is no multiple of
    --required-batch-size-multiple, by default 8: sentences of a test set would go untranslated and
    unscored, without a word."""
    from fairseq.data import data_utils

    stock = data_utils.batch_by_size

    @wraps(stock)
    def batch_by_size(indices, *args, **kwargs):
        batches = list(stock(indices, *args, **kwargs))
        batched = sum(map(len, batches))
        if batched < len(indices):  # batches are consecutive parts of the indices
            batches.append(indices[batched:])
        return batches

    data_utils.batch_by_size = batch_by_size


def write_log_files_once():
    """With --log-file, fairseq opens the file anew at every epoch and validation, and writes what
    follows once more each time."""
    from fairseq.logging import progress_bar

    stock = progress_bar.progress_bar

    @wraps(stock)
    def make_progress_bar(*args, log_file=None, **kwargs):
        if log_file is not None and any(
            getattr(handler, "baseFilename", None) == os.path.abspath(log_file)
            for handler in progress_bar.logger.handlers
        ):
            log_file = None
        return stock(*args, log_file=log_file, **kwargs)

    progress_bar.progress_bar = make_progress_bar


def explain_chosen_parts_in_help():
    """fairseq parses twice, and learns the options of model, task and criterion in between; its
    --help ends the first parsing and so never shows them."""
    from fairseq import options

    stock = options.parse_args_and_arch
    help_flags = {"-h", "--help"}

    @wraps(stock)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        input_args = sys.argv[1:] if input_args is None else input_args
        if help_flags.intersection(input_args):
            stock_parse = parser.parse_known_args

            def parse_without_help(arguments, namespace=None):
                parser.parse_known_args = stock_parse  # the next parsing may show it
                return stock_parse([a for a in arguments if a not in help_flags], namespace)

            parser.parse_known_args = parse_without_help
        return stock(parser, input_args, *args, **kwargs)

    options.parse_args_and_arch = parse_args_and_arch


def print_user_errors_in_one_line():
    """A mistake in an option deserves a sentence, not a traceback. Also when fairseq has wrapped
    the error in one of its own."""
    stock_hook = sys.excepthook

    def hook(kind, error, traceback):
        cause = error
        while cause is not None and not isinstance(cause, OneLineError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            stock_hook(kind, error, traceback)
        else:
            print(f"error: {cause}", file=sys.stderr)

    sys.excepthook = hook
