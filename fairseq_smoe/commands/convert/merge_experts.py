"""Fewer experts: group those that are alike within each stratum, and merge every group."""

import math

from fairseq_smoe.commands.convert.text_options import add_text_options, check_text_options
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import parse_strata

SENTENCES = 128
EPOCHS, LEARNING_RATE = 50, 0.1


def add_arguments(parser):
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--strata",
        metavar="E-E",
        help="experts of each stratum afterwards, e.g. 3-3; the number of strata stays",
    )
    size.add_argument(
        "--experts", type=int, metavar="E", help="the same for a model with one stratum"
    )
    parser.add_argument(
        "--similarity",
        choices=("outputs", "weights", "surrogate"),
        default="outputs",
        help="how experts are compared: by linear CKA of their outputs on the text, by the squared "
        "difference of their weights, or by that of the products W1 W2 (default: %(default)s)",
    )
    parser.add_argument(
        "--merge",
        choices=("mean", "frequency", "most-visited", "learned"),
        default="mean",
        help="what becomes of a group: the mean of its experts, their mean weighted by how often "
        "the text visits them, the most visited one alone, or a weighted sum that is learned on "
        "the text (default: %(default)s)",
    )
    parser.add_argument(
        "--align",
        action="store_true",
        help="before merging, put the hidden units of the experts of a group into the order that "
        "is nearest to that of its most visited expert (of the first one, if no text is read)",
    )
    parser.add_argument(
        "--gate-bias",
        action="store_true",
        help="give a merged expert the probability of all experts of its group: the logarithm of "
        "their number, as a bias of the gates (--moe-gate-bias)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"of --merge learned, with 12 steps each (default: {EPOCHS})",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="R",
        help=f"of --merge learned (default: {LEARNING_RATE})",
    )
    add_text_options(parser, SENTENCES)


def check(args):
    if args.experts is not None and args.experts < 1:
        raise OptionError(f"--experts {args.experts}: expected 1 or more")
    args.strata = (args.experts,) if args.strata is None else parse_strata(args.strata, "--strata")
    for flag, value, default in (
        ("--epochs", args.epochs, EPOCHS),
        ("--learning-rate", args.learning_rate, LEARNING_RATE),
    ):
        if value is None:
            setattr(args, flag[2:].replace("-", "_"), default)
        elif args.merge != "learned":
            raise OptionError(f"{flag} {value}: needs --merge learned")
        elif not (value > 0 and math.isfinite(value)):
            raise OptionError(f"{flag} {value}: expected more than 0")
    check_text_options(args)


def convert(source, args):
    from fairseq_smoe.conversion.fewer_experts import merge_experts

    return merge_experts(source, args)
