"""Translate a model's test sets in all directions and score them, loading the model once.

Skips what is already done, so that an interrupted call continues where it stopped.
"""

import argparse
import ast
import sys

from fairseq_smoe.benchmarks.runs import (
    add_model_arguments,
    comma_separated,
    find_checkpoint,
    find_training,
)
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.defaults import CPU_TOKENS, GPU_TOKENS, MOST_CPU_PROCESSES
from fairseq_smoe.evaluation.ranks import END, Ranks
from fairseq_smoe.evaluation.scoring import add_scoring_options
from fairseq_smoe.translation.contrast_options import ContrastOptions, add_contrast_options


def add_arguments(parser):
    add_model_arguments(parser)
    parser.add_argument(
        "--directions",
        type=comma_separated,
        metavar="A-B,...",
        help="(default: all of the benchmark, or of the training)",
    )
    parser.add_argument(
        "--subset",
        type=comma_separated,
        action="extend",
        metavar="NAME,...",
        help="what to translate, as fairseq's --gen-subset; may be repeated (default: test)",
    )
    group = parser.add_argument_group("translation", "names and defaults are fairseq-generate's")
    for option, kind, default in (
        ("--beam", _positive, 5),
        ("--lenpen", float, 1.0),
        ("--max-len-a", float, 0.0),
        ("--max-len-b", int, 200),
    ):
        group.add_argument(option, type=kind, default=default, help="(default: %(default)s)")
    group.add_argument(
        "--max-tokens",
        type=_positive,
        metavar="N",
        help="source tokens of a batch; halved when a GPU's memory is too small (default: "
        f"{CPU_TOKENS}, on a GPU {GPU_TOKENS})",
    )
    group.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="each translates directions of its own (default: one per GPU; without a GPU one "
        f"per core, at most {MOST_CPU_PROCESSES})",
    )
    group.add_argument(
        "--model-overrides",
        type=_dictionary,
        default={},
        metavar="DICT",
        help="options of the model to change, as a Python dictionary in quotes, e.g. "
        "\"{'moefy_k': 8}\"; translations made with others are made again",
    )
    group.add_argument("--cpu", action="store_true", help="do not use GPUs")
    group.add_argument("--fp16", action="store_true", help="on a GPU: half precision")
    add_contrast_options(group)
    add_scoring_options(parser)
    parser.add_argument("--no-score", action="store_true", help="only translate")


def _positive(text):
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 1")
    return int(text)


def _dictionary(text):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    plain = isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(item, str | int | float | None)
        for name, item in value.items()
    )
    if not plain:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a Python dictionary in quotes, such as \"{{'moefy_k': 8}}\""
        )
    return value


def run(args):
    # check the options before fairseq is imported, which takes seconds
    ContrastOptions.of(args).check()
    if args.fp16 and args.cpu:
        raise OptionError("--fp16: is for GPUs; leave out --cpu or --fp16")
    with Ranks.of_torchrun() as ranks:
        try:
            if ranks is None or ranks.is_first:
                _evaluate(args, ranks)
            else:
                _help(args, ranks)
        except KeyboardInterrupt:
            # fairseq's incomplete datasets would complain when they are destroyed
            sys.unraisablehook = lambda unraisable: None
            raise


def _evaluate(args, ranks):
    if ranks is not None:
        ranks.check_processes(args.processes)
    training = find_training(args)
    checkpoint = find_checkpoint(args, training)
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.evaluation.command import evaluate

    evaluate(args, training, checkpoint, ranks)


def _help(args, ranks):
    """What the ranks behind the first do, whose mistakes the first one tells."""
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.evaluation.command import help_to_evaluate

    ranks.see_folder()
    training = find_training(args)
    help_to_evaluate(args, training, find_checkpoint(args, training), ranks)
    ranks.ask(END)
