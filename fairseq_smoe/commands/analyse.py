"""Count what the experts of a trained model do, per direction, block, expert, stratum and token
type.

Runs teacher-forced passes over a data set and writes CSV files into RUN/analysis/SUBSET/. Encoder
tokens are those of the source, with its language token and end of sentence. Decoder tokens are the
decoder's input, i.e. the target shifted by one. Padding does not count.
"""

import warnings

from fairseq_smoe.benchmarks.runs import (
    add_model_arguments,
    comma_separated,
    find_checkpoint,
    find_training,
)
from fairseq_smoe.errors import OptionError

TRAINING_SAMPLE = 2000


def add_arguments(parser):
    parser.description = __doc__
    add_model_arguments(parser)
    parser.add_argument(
        "--subset",
        type=comma_separated,
        default=["valid"],
        metavar="NAME,...",
        help="train, valid, test, ... (default: valid)",
    )
    parser.add_argument(
        "--directions",
        type=comma_separated,
        metavar="A-B,...",
        help="analyse these directions only (default: all)",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        metavar="N",
        help="as many sentences of each direction, drawn at random; 0 for all (default: "
        f"{TRAINING_SAMPLE} of the training set, all of other sets)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="tokens per batch; the results do not depend on it (default: %(default)s)",
    )
    parser.add_argument(
        "--types",
        type=int,
        default=25,
        metavar="N",
        help="token types of highest, and of lowest, requested capacity to list per block and "
        "direction (default: %(default)s, as in the paper's Figure 3)",
    )
    parser.add_argument(
        "--min-count",
        type=int,
        default=5,
        metavar="N",
        help="occurrences in the data set that a type needs to be listed (default: %(default)s)",
    )


def run(args):
    for option in ("max_sentences", "max_tokens", "types", "min_count"):
        value = getattr(args, option)
        least = 0 if option in ("max_sentences", "types") else 1
        if value is not None and value < least:
            raise OptionError(f"--{option.replace('_', '-')} {value}: expected {least} or more")
    training = find_training(args)
    checkpoint = find_checkpoint(args, training)
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    from fairseq_smoe.analysis.analysis import analyse

    for subset in args.subset:
        max_sentences = args.max_sentences
        if max_sentences is None:
            max_sentences = TRAINING_SAMPLE if subset == "train" else 0
        analyse(
            training,
            checkpoint,
            data=args.data,
            subset=subset,
            directions=args.directions,
            max_sentences=max_sentences,
            max_tokens=args.max_tokens,
            num_types=args.types,
            min_count=args.min_count,
        )
