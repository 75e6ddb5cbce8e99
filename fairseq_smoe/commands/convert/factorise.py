"""Convert a mixture into one whose experts are products of tensors, the largest in common."""

from fairseq_smoe.commands.convert.dense_options import add_seed_option, check_noise, check_seed
from fairseq_smoe.errors import OptionError


def add_arguments(parser):
    parser.add_argument(
        "--mpo-bond",
        "--bond",
        type=int,
        default=0,
        metavar="N",
        help="limit of the bonds between the tensors of an expert's matrix: the smaller, the fewer "
        "parameters (default: 0, none)",
    )
    parser.add_argument(
        "--mpo-share",
        "--share",
        choices=("block", "stratum"),
        default="block",
        help="experts that have a central tensor in common (default: %(default)s)",
    )
    parser.add_argument(
        "--mpo-bias",
        "--bias",
        choices=("own", "common"),
        default="own",
        help="biases: those of the experts, or their mean in common, as in the paper (default: "
        "%(default)s)",
    )
    for side, width in (("in", "model's"), ("out", "experts'")):
        parser.add_argument(
            f"--mpo-{side}-shape",
            f"--{side}-shape",
            metavar="FACTORS",
            help=f"factors of the {width} width, joined by commas (default: five, nearly equal)",
        )
    parser.add_argument(
        "--sweeps",
        type=int,
        default=30,
        metavar="N",
        help="most sweeps of alternating least squares; fewer if they no longer help (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="standard deviation of what is added to the experts' own tensors, relative to their "
        "root mean square; for experts that are equal (default: 0)",
    )
    add_seed_option(parser)


def check(args):
    check_seed(args)
    check_noise(args)
    if args.mpo_bond < 0:
        raise OptionError(f"--mpo-bond {args.mpo_bond}: expected 0 (no limit) or more")
    if args.sweeps < 0:
        raise OptionError(f"--sweeps {args.sweeps}: expected 0 (none) or more")


def convert(source, args):
    from fairseq_smoe.conversion.factorise import factorise_experts

    names = ("mpo_bond", "mpo_share", "mpo_bias", "mpo_in_shape", "mpo_out_shape")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return factorise_experts(source, given, args.sweeps, args.noise, args.seed)
