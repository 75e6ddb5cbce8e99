"""What the installed fairseq (ve-fairseq 0.12.3) and torch 2.11-2.13 need to work together.

Each function fixes one thing, and its docstring says what goes wrong without it. :func:`apply` runs
all of them. It is called once, when the plugin is loaded.
"""

import gc
import importlib.util
import logging
import os
import sys
from functools import wraps

import torch
import torch.distributed as dist

from fairseq_smoe.errors import OneLineError, OptionError
from fairseq_smoe.training.lost_ranks import is_lost_connection, place_of, roll_call


def apply():
    find_torchrun_processes_on_cpu()
    refuse_to_train_nothing()
    keep_off_the_tpu()
    let_ddp_run_on_cpu()
    write_log_files_once()
    explain_chosen_parts_in_help()
    refuse_options_that_do_not_work()
    print_user_errors_in_one_line()
    leave_garbage_to_the_parent()


def find_torchrun_processes_on_cpu():
    """fairseq derives the number of processes from the number of GPUs. Under torchrun without GPUs,
    every process would train alone; if the number is given, fairseq would divide by zero GPUs."""
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


def refuse_to_train_nothing():
    """fairseq starts as many processes as there are GPUs. Without a GPU it would start none, and
    end at once without an error."""
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    @wraps(stock)
    def call_main(cfg, main, **kwargs):
        training = cfg.distributed_training
        alone = training.distributed_no_spawn or _under_torchrun()
        if training.distributed_world_size > 1 and not (alone or torch.cuda.is_available()):
            raise OptionError(
                f"--distributed-world-size {training.distributed_world_size}: fairseq starts one "
                "process per GPU, and there is no GPU; start the processes with torchrun "
                f"--nproc_per_node {training.distributed_world_size} --no-python fairseq-train ..."
            )
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def keep_off_the_tpu():
    """Without a GPU, --bf16 makes fairseq use a TPU, even if there is none."""
    from fairseq.distributed import utils as distributed_utils

    stock = distributed_utils.call_main

    @wraps(stock)
    def call_main(cfg, main, **kwargs):
        use_no_absent_tpu(cfg)
        return stock(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def use_no_absent_tpu(cfg):
    """Take back that fairseq's options are to use a TPU, if there is none."""
    if importlib.util.find_spec("torch_xla") is None:
        for part in filter(None, (cfg.common, cfg.distributed_training, cfg.optimizer)):
            if getattr(part, "tpu", False):
                part.tpu = False


def _under_torchrun():
    return all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))


def let_ddp_run_on_cpu():
    """With --ddp-backend pytorch_ddp, fairseq passes a GPU's number to torch's DDP, which refuses
    it for modules on the CPU."""
    from fairseq.models import distributed_fairseq_model

    stock = distributed_fairseq_model.DistributedDataParallel

    @wraps(stock, updated=())
    def ddp(module, device_ids=None, output_device=None, **kwargs):
        if not next(module.parameters()).is_cuda:
            device_ids = output_device = None
        return stock(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = ddp


def write_log_files_once():
    """With --log-file, fairseq adds another handler for the file in every epoch and validation, so
    later lines are written several times."""
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
    """fairseq parses the command line twice, and adds the options of model, task and criterion in
    between. Its --help ends the first parse, and so never shows them."""
    from fairseq import options

    stock = options.parse_args_and_arch
    help_flags = {"-h", "--help"}

    @wraps(stock)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        input_args = sys.argv[1:] if input_args is None else input_args
        if help_flags.intersection(input_args):
            stock_parse = parser.parse_known_args

            def parse_without_help(arguments, namespace=None):
                parser.parse_known_args = stock_parse  # the next parse may show it
                return stock_parse([a for a in arguments if a not in help_flags], namespace)

            parser.parse_known_args = parse_without_help
        return stock(parser, input_args, *args, **kwargs)

    options.parse_args_and_arch = parse_args_and_arch


def refuse_options_that_do_not_work():
    """Many of fairseq's options are for other tasks, and end in a traceback or have no effect. Some
    only print what they should do."""
    from fairseq import options

    from fairseq_smoe.translation.refused_options import TASK, check_parsed

    stock = options.parse_args_and_arch

    @wraps(stock)
    def parse_args_and_arch(parser, input_args=None, *args, **kwargs):
        words = sys.argv[1:] if input_args is None else list(map(str, input_args))
        if "--sacrebleu" in words and "--scoring" not in words and TASK in words:
            input_args = [*words, "--scoring", "sacrebleu"]
        parsed = stock(parser, input_args, *args, **kwargs)
        options_of_all = parsed[0] if isinstance(parsed, tuple) else parsed
        complete = hasattr(options_of_all, "dataset_impl")  # else only those that were given
        if complete and getattr(options_of_all, "task", None) == TASK:
            check_parsed(options_of_all, parser.get_default)
            if hasattr(options_of_all, "beam"):
                # fairseq-interactive would read its input in as many processes as there are GPUs
                options_of_all.distributed_world_size = 1
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def print_user_errors_in_one_line():
    """Print user errors without a traceback, even if fairseq has wrapped the error in one of its
    own."""
    stock_hook = sys.excepthook

    def hook(kind, error, traceback):
        causes = [error]
        while causes[-1] is not None and causes[-1] not in causes[:-1]:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        ours = [cause for cause in causes if isinstance(cause, OneLineError)]
        if ours:
            print(f"error: {ours[0]}", file=sys.stderr)
        elif dist.is_initialized() and any(map(is_lost_connection, causes)):
            cause = roll_call(place_of(error))
            # torch captures sys.stderr, and prints it only when this function returns
            print(f"error: {cause} ({error})", file=sys.__stderr__, flush=True)
            logging.shutdown()
            os._exit(1)  # torch's cleanup at exit may wait for the lost ranks
        else:
            stock_hook(kind, error, traceback)

    sys.excepthook = hook


def leave_garbage_to_the_parent():
    """Data workers are forks, made while the loaders of earlier passes over the data may still wait
    for the garbage collector. In a worker it would try to end those, and print a traceback that
    ends with "can only test a child process"."""
    os.register_at_fork(after_in_child=gc.freeze)
