"""Beam search of the rows of a table compared with that of its dense model.

Translates made-up sentences of 10 to 50 words with untrained models. All translations have the same
length, so all models make the same number of steps. The row and the dense model take turns in one
process. Efficiency is tokens per second times FLOPs per token, both relative to the dense model.
Example:

    python scripts/bench_generate.py --rows smoe-2-2-2-2 vanilla-moe --beam 5
"""

import torch
from benchmarking import build, compare_rows, make_parser

from fairseq_smoe.diagnosis.untrained import made_up_sentences

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def main():
    parser = make_parser(__doc__, tokens=1000, rounds=5)
    parser.add_argument("--beam", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=30, help="of translations (default: %(default)s)"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp16", help="on a GPU (default: %(default)s)"
    )
    args = parser.parse_args()
    compare_rows(args, translator, f"beam {args.beam}, {args.tokens} source tokens")


def translator(benchmark, row, args, use_cuda):
    """A function that translates all sentences in one batch."""
    from fairseq import utils
    from fairseq.data.data_utils import collate_tokens
    from fairseq.sequence_generator import SequenceGenerator

    _, task, model, _ = build(benchmark, row, args, use_cuda)
    model.eval()
    dictionary = task.source_dictionary
    source = made_up_sentences(dictionary, args.tokens, args.seed)
    sample = {
        "net_input": {
            "src_tokens": collate_tokens(source, dictionary.pad(), left_pad=True),
            "src_lengths": torch.tensor([len(sentence) for sentence in source]),
        }
    }
    if use_cuda:
        model = model.to("cuda", PRECISIONS[args.precision])
        sample = utils.move_to_cuda(sample)
    generator = SequenceGenerator(
        [model], dictionary, beam_size=args.beam, max_len_b=args.length, min_len=args.length
    )
    return lambda: generator.generate([model], sample)


if __name__ == "__main__":
    main()
