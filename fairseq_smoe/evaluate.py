"""Translate a model's test sets in all directions and score them, loading the model once.

What is done is skipped: an interrupted call goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from fairseq_smoe import benchmark as benchmarks
from fairseq_smoe.errors import OptionError
from fairseq_smoe.runs import add_row_arguments, find_run, read_run
from fairseq_smoe.scoring import add_scoring_options


def add_arguments(parser):
    add_row_arguments(parser, optional=True)
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="instead of BENCHMARK ROW: folder of a model of your own, with checkpoints/",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="(default: checkpoints/checkpoint_best.pt in the run's folder)",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="binarised data (default: that of the training)"
    )
    parser.add_argument(
        "--directions",
        type=_list,
        metavar="A-B,...",
        help="(default: all of the benchmark, or of the training)",
    )
    parser.add_argument(
        "--subset",
        type=_list,
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
        help="source tokens of a batch; halved when a GPU's memory is too small (default: 12000, "
        "on a GPU 65536)",
    )
    group.add_argument(
        "--processes",
        type=_positive,
        metavar="N",
        help="each translates directions of its own (default: one per GPU; without a GPU one "
        "per core, at most 8)",
    )
    group.add_argument("--cpu", action="store_true", help="do not use a GPU that is there")
    group.add_argument("--fp16", action="store_true", help="on a GPU: half precision")
    add_scoring_options(parser)
    parser.add_argument("--no-score", action="store_true", help="only translate")


def _list(text):
    return [word for word in text.split(",") if word]


def _positive(text):
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 1")
    return int(text)


def run(args):
    # whatever can be wrong here is found before fairseq is imported, which takes seconds
    training = find_training(args)
    checkpoint = find_checkpoint(args, training)
    if args.fp16 and args.cpu:
        raise OptionError("--fp16: is for GPUs; leave out --cpu or --fp16")
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.evaluation.command import evaluate

    try:
        evaluate(args, training, checkpoint)
    except KeyboardInterrupt:
        # fairseq's half-made datasets would complain when they are taken apart
        sys.unraisablehook = lambda unraisable: None
        raise


def find_training(args):
    """The :class:`~fairseq_smoe.runs.Run` that is asked for.

    Raises:
        OptionError: there is none, or more or less than one is asked for.
    """
    if args.run is not None:
        if args.benchmark:
            raise OptionError(f"--run {args.run}: give either this or BENCHMARK ROW")
        return read_run(args.run)
    if not args.benchmark:
        raise OptionError(
            f"give BENCHMARK ROW, where BENCHMARK is one of {', '.join(benchmarks.NAMES)}, or the "
            "folder of a model of your own with --run"
        )
    if not args.row:
        rows = ", ".join(row.slug for row in benchmarks.load(args.benchmark).rows)
        raise OptionError(f"{args.benchmark}: give one of its rows, too: {rows}")
    return find_run(args)


def find_checkpoint(args, training):
    """The file to evaluate.

    Raises:
        OptionError: there is none.
    """
    path = args.checkpoint or training.checkpoints / "checkpoint_best.pt"
    if path.is_file():
        return path
    remedy = "train the model first: python -m fairseq_smoe train, or fairseq-train --save-dir "
    remedy += str(training.checkpoints)
    if args.benchmark:
        remedy = (
            f"train the model first: bash scripts/train.sh {args.benchmark} {training.row.slug} "
            f"--scale {args.scale} --seed {args.seed} --runs {args.runs}"
            if training.facts
            else remedy
        )
    others = sorted(training.checkpoints.glob("checkpoint*.pt"))
    if others:
        remedy = f"choose one with --checkpoint, e.g. {others[-1]}, or {remedy}"
    raise OptionError(f"{path}: no such checkpoint; {remedy}")
