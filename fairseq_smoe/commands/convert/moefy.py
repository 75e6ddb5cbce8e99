"""``convert moefy``: split FFNs into small experts, of which each token computes the best."""

from importlib.util import find_spec

from fairseq_smoe.commands.convert.text_options import add_text_options, check_text_options
from fairseq_smoe.errors import OptionError

LAYERS = ("dense", "experts")
SPLITS = ("cluster", "graph", "random")
SELECT = ("mlp", "similarity", "oracle")


def add_arguments(parser):
    group = parser.add_argument_group("small experts")
    group.add_argument(
        "--layers",
        type=lambda text: text.split(","),
        metavar="WHICH,...",
        help="'dense': the FFNs of dense layers; 'experts': every expert of the expert layers "
        "(default: both, as far as there are any)",
    )
    group.add_argument(
        "--moefy-experts",
        type=int,
        metavar="N",
        help="split each FFN into N small experts of equal size (default: about 32 hidden units "
        "each)",
    )
    group.add_argument(
        "--moefy-split",
        choices=SPLITS,
        default="cluster",
        help="which hidden units go together: 'cluster' those with similar weights, 'graph' those "
        "that are active together (needs pymetis), or 'random' (default: %(default)s)",
    )
    group.add_argument(
        "--moefy-select",
        choices=SELECT,
        default="mlp",
        help="how a token chooses: 'mlp' a router that is trained for each FFN, 'similarity' the "
        "mean vector of a small expert, 'oracle' the true best, which takes the time of the first "
        "layer (default: %(default)s)",
    )
    group.add_argument(
        "--moefy-k",
        default="25%",
        metavar="K",
        help="small experts that a token keeps: a number, 0 for all, or a percentage. May be "
        "changed for translation with --model-overrides (default: 25%%)",
    )
    group.add_argument(
        "--router-tokens",
        type=int,
        default=30000,
        metavar="N",
        help="of the text, drawn at random for each FFN; a tenth of them tests the router "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of all that is random (default: 1)"
    )
    add_text_options(parser, sentences=500)


def check(args):
    wrong = [name for name in args.layers or () if name not in LAYERS]
    if wrong:
        raise OptionError(f"--layers {','.join(args.layers)}: expected dense, experts, or both")
    if args.moefy_experts is not None and args.moefy_experts < 2:
        raise OptionError(f"--moefy-experts {args.moefy_experts}: expected 2 or more")
    if args.router_tokens < 100:
        raise OptionError(f"--router-tokens {args.router_tokens}: expected 100 or more")
    if args.moefy_split == "graph" and find_spec("pymetis") is None:
        raise OptionError(
            "--moefy-split graph: needs the package pymetis; pip install pymetis, or choose cluster"
        )
    check_text_options(args)


def convert(source, args):
    from fairseq_smoe.conversion.moefy.steps import moefy

    return moefy(source, args)
