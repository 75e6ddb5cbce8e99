"""Convert a dense model into one with adapters on its FFNs."""

from fairseq_smoe.commands.convert.dense_options import (
    add_dense_options,
    check_dense_options,
    layers_of,
)
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import parse_strata


def add_arguments(parser):
    add_dense_options(parser)
    parser.add_argument(
        "--pesc-adapter-dim",
        "--adapter-dim",
        type=int,
        default=0,
        metavar="N",
        help="hidden units of an adapter (default: half of the model's width)",
    )
    parser.add_argument(
        "--pesc-freeze",
        "--freeze",
        choices=("none", "ffn", "backbone"),
        default="none",
        help="what a training of the new model leaves as it is: the shared FFNs, or all that the "
        "dense model has; gates and adapters are always trained (default: %(default)s)",
    )
    parser.add_argument(
        "--moe-top1-expert",
        "--top1",
        action="store_true",
        help="a token visits one adapter in a pass instead of two",
    )


def check(args):
    check_dense_options(args)
    if args.pesc_adapter_dim < 0:
        raise OptionError(
            f"--pesc-adapter-dim {args.pesc_adapter_dim}: expected 1 or more, or 0 for half of the "
            "model's width"
        )


def convert(source, args):
    from fairseq_smoe.conversion.pesc import add_adapters

    given = {"pesc_adapter_dim": args.pesc_adapter_dim, "pesc_freeze": args.pesc_freeze}
    if args.moe_top1_expert:
        given["moe_top1_expert"] = True
    return add_adapters(
        source, parse_strata(args.smoe_strata), given, layers_of(args), seed=args.seed
    )
