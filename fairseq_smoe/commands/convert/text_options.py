"""Options of the conversions that need text."""

import re
from pathlib import Path

from fairseq_smoe.errors import OptionError

_TEST = re.compile(r"test\d*$")  # fairseq's names of test sets


def add_text_options(parser, sentences):
    """Add the options that name the text.

    Args:
        sentences: default of ``--max-sentences``.
    """
    group = parser.add_argument_group("text")
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="binarised data (default: that of the training)"
    )
    group.add_argument(
        "--subset",
        default="valid",
        metavar="NAME",
        help="train, valid, ...; never a test set (default: %(default)s)",
    )
    group.add_argument(
        "--max-sentences",
        type=int,
        default=sentences,
        metavar="N",
        help="as many sentences of each direction, drawn at random; 0 for all (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="of a batch (default: %(default)s)",
    )


def check_text_options(args):
    """Raises:
    OptionError: an option is out of its range, or names a test set.
    """
    if _TEST.match(args.subset):
        raise OptionError(
            f"--subset {args.subset}: a model that is fitted to a test set cannot be tested on it; "
            "give --subset valid, or train"
        )
    if args.max_sentences < 0:
        raise OptionError(f"--max-sentences {args.max_sentences}: expected 0 (all) or more")
    if args.max_tokens < 1:
        raise OptionError(f"--max-tokens {args.max_tokens}: expected 1 or more")
