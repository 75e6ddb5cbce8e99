"""Convert a dense model into one whose experts begin as copies of its FFNs."""

import argparse

from fairseq_smoe.commands.convert.dense_options import (
    add_dense_options,
    check_dense_options,
    check_noise,
    layers_of,
)
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import parse_strata

GATES = ("top-k", "threshold")
# options of training with which the new model would not compute what the dense one does
REFUSED = {
    "--moe-top1-expert": "one expert is weighted by its probability instead of 1; leave it out, or "
    "give --moe-gate threshold here, and --moe-threshold 0 in training",
    "--moe-eom": "in translation the outputs of all experts are scaled down; leave it out",
    "--moe-cmr": "has a dense FFN of its own beside the experts; leave it out",
    "--smoe-stacking": "stacked layers have no residual between them; leave it out",
}


def add_arguments(parser):
    add_dense_options(parser)
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="standard deviation of what is added to every number of the experts, relative to the "
        "root mean square of its tensor (default: 0, the experts are equal)",
    )
    parser.add_argument(
        "--moe-gate",
        choices=GATES,
        default=GATES[0],
        help="gates of the new model: top-k takes two experts, threshold as many as a token needs "
        "(default: %(default)s)",
    )
    for flag in REFUSED:
        parser.add_argument(flag, nargs="?", const="", dest=flag, help=argparse.SUPPRESS)


def check(args):
    for flag, reason in REFUSED.items():
        if getattr(args, flag) is not None:
            raise OptionError(f"{flag}: the new model would not be the dense one: {reason}")
    check_dense_options(args)
    check_noise(args)


def convert(source, args):
    from fairseq_smoe.conversion.upcycle import copy_into_experts

    return copy_into_experts(
        source,
        parse_strata(args.smoe_strata),
        args.moe_gate,
        layers_of(args),
        noise=args.noise,
        seed=args.seed,
    )
