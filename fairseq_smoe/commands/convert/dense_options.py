"""Options of the conversions that start from a dense model."""

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import parse_strata

SEEDS = 1 << 63  # torch takes no greater ones


def add_dense_options(parser):
    parser.add_argument(
        "--smoe-strata",
        "--strata",
        required=True,
        metavar="LAYOUT",
        help="experts of each stratum, first to last, e.g. 8, or 4-4",
    )
    parser.add_argument(
        "--moe-freq",
        type=int,
        default=2,
        metavar="N",
        help="every Nth layer of encoder and decoder gets experts (default: %(default)s)",
    )
    for side in ("encoder", "decoder"):
        parser.add_argument(
            f"--{side}-moe-freq",
            type=int,
            metavar="N",
            help=f"overrides --moe-freq in the {side}; 0: its layers stay dense",
        )
    add_seed_option(parser)


def add_seed_option(parser):
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of what is drawn (default: %(default)s)"
    )


def check_dense_options(args):
    """Raises:
    OptionError: an option is out of its range.
    """
    parse_strata(args.smoe_strata)
    for name, period in layers_of(args).items():
        if period is not None and period < 0:
            raise OptionError(
                f"--{name.replace('_', '-')} {period}: expected 1 or more, or 0 for one side that "
                "stays dense"
            )
    check_seed(args)


def check_seed(args):
    """Raises:
    OptionError: torch would not take the seed.
    """
    if not 0 <= args.seed < SEEDS:
        raise OptionError(f"--seed {args.seed}: expected a number from 0 below 2^63")


def check_noise(args):
    """Raises:
    OptionError: the noise is negative, or no number.
    """
    if not 0 <= args.noise < float("inf"):
        raise OptionError(f"--noise {args.noise}: expected 0 (none) or more")


def layers_of(args):
    """Which layers become expert layers."""
    names = ("moe_freq", "encoder_moe_freq", "decoder_moe_freq")
    return {name: getattr(args, name) for name in names}
