"""FFNs in small experts (MoEfication) compared with the same dense FFNs, and beam search with both.

Models are untrained and routers are random, so that tokens spread over all small experts: with a
trained router, tokens of a sentence choose more alike. Both sides take turns in one process, in one
thread. The FFNs are those of all layers, one after another, as in a model, with tokens of their own.
Ratios are times of the dense side by times of the other, medians with quartiles. Example:

    python scripts/bench_moefy.py --kept 16 32 --sentences 1 33 --to results/bench_moefy
"""

import argparse
import logging
import warnings
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from benchmarking import add_common_options, in_turns, publish, quartiles, told
from torch import nn
from tqdm import tqdm

import fairseq_smoe
from fairseq_smoe.diagnosis.untrained import made_up_sentences

MEAN_LENGTH = 30  # of the made-up sentences


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser, rounds=15)
    parser.set_defaults(threads=1, cpu=True)
    add = parser.add_argument
    add("--embed-dim", type=int, default=512, help="(default: %(default)s)")
    add("--ffn-dim", type=int, default=2048, help="(default: %(default)s)")
    add("--layers", type=int, default=6, help="of encoder and decoder each (default: %(default)s)")
    add("--experts", type=int, default=64, help="small experts of an FFN (default: %(default)s)")
    add("--kept", type=int, nargs="+", default=[16], help="of them by a token (default: 16)")
    add("--vocab", type=int, default=8000, help="of beam search (default: %(default)s)")
    add(
        *("--rows", "--tokens"),
        dest="tokens",
        type=int,
        nargs="*",
        default=[1, 2, 5, 10, 20, 40, 80, 165, 330, 1000, 4000],
        help="tokens that an FFN gets at once (default: 1 to 4000)",
    )
    add(
        "--sentences",
        type=int,
        nargs="*",
        default=[1, 4, 33],
        help="of a batch of beam search (default: 1 4 33)",
    )
    add("--beam", type=int, default=5, help="(default: %(default)s)")
    add("--length", type=int, default=30, help="of translations (default: %(default)s)")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    fairseq_smoe.register()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    ffns, searches = [], []
    total = len(args.kept) * (len(args.tokens) + len(args.sentences))
    with tqdm(total=total * args.rounds, unit="round") as progress, torch.inference_mode():
        for kept in args.kept:
            ffns += compare_ffns(args, kept, progress)
            searches += compare_searches(args, kept, progress)
    share = {kept: f"{kept} of {args.experts} ({kept / args.experts:.0%})" for kept in args.kept}
    lines = [
        f"| FFNs {args.embed_dim} x {args.ffn_dim} in {args.experts} small experts | kept "
        "| speed relative to dense (quartiles) |\n|---|---|---:|"
    ]
    lines += [f"| {r['tokens']} tokens | {share[r['kept']]} | {speed(r)} |" for r in ffns]
    lines += [
        f"\n| Beam search, {args.layers}+{args.layers} layers, beam {args.beam} | kept "
        "| speed relative to dense (quartiles) |\n|---|---|---:|"
    ]
    lines += [
        f"| sentences: {r['sentences']} | {share[r['kept']]} | {speed(r)} |" for r in searches
    ]
    publish("\n".join(lines), args, {"ffns": ffns, "beam_search": searches}, None)


def speed(result):
    return told(result["speed"], *result["quartiles"])


def measured(ratios, **facts):
    low, median, high = quartiles(ratios)
    return {**facts, "speed": median, "quartiles": [low, high]}


def moefied(args, kept):
    from fairseq_smoe.moe.expert_kinds.moefied import MoefiedOptions

    return MoefiedOptions(moefy_experts=args.experts, moefy_k=str(kept))


def random_routers(model):
    """Routers by which tokens spread over the small experts."""
    for name, parameter in model.named_parameters():
        if name.endswith(("router_in", "router_out")):
            nn.init.normal_(parameter)


def compare_ffns(args, kept, progress):
    from fairseq_smoe.moe.moefied_ffn import MoefiedFFN

    dims = args.embed_dim, args.ffn_dim
    layers = [(nn.Linear(*dims), nn.Linear(*dims[::-1])) for _ in range(2 * args.layers)]
    split = nn.ModuleList(MoefiedFFN(*layer, moefied(args, kept)) for layer in layers).eval()
    random_routers(split)
    found = []
    for tokens in args.tokens:
        inputs = [torch.randn(tokens, args.embed_dim) for _ in layers]

        def dense():
            for (fc1, fc2), x in zip(layers, inputs):
                fc2(F.relu(fc1(x)))

        def small():
            for ffn, x in zip(split, inputs):
                ffn(x)

        progress.set_description(f"{tokens} tokens, {kept} kept")
        ratios = in_turns(dense, small, args.rounds, progress)
        found.append(measured(ratios, tokens=tokens, kept=kept))
    return found


def compare_searches(args, kept, progress):
    from fairseq.data import Dictionary
    from fairseq.data.data_utils import collate_tokens
    from fairseq.sequence_generator import SequenceGenerator

    dictionary = Dictionary()
    for i in range(args.vocab):
        dictionary.add_symbol(str(i))
    words = ["--moefy-dense", "--moefy-experts", args.experts, "--moefy-k", kept]
    models = [build(args, dictionary, more) for more in ([], words)]
    random_routers(models[1])
    source = made_up_sentences(
        dictionary, max(args.sentences, default=0) * MEAN_LENGTH * 2, args.seed
    )
    source = [source[i] for i in torch.randperm(len(source)).tolist()]
    found = []
    for number in args.sentences:
        batch = sorted(source[:number], key=len, reverse=True)
        sample = {
            "net_input": {
                "src_tokens": collate_tokens(batch, dictionary.pad(), left_pad=True),
                "src_lengths": torch.tensor([len(sentence) for sentence in batch]),
            }
        }
        jobs = [
            lambda model=model: SequenceGenerator(
                [model],
                dictionary,
                beam_size=args.beam,
                max_len_b=args.length,
                min_len=args.length,
            ).generate([model], sample)
            for model in models
        ]
        progress.set_description(f"{number} sentences, {kept} kept")
        ratios = in_turns(*jobs, args.rounds, progress)
        found.append(measured(ratios, sentences=number, kept=kept))
    return found


def build(args, dictionary, words):
    """A dense model with random weights, or with ``words`` one of small experts."""
    from fairseq_smoe.accounting.flops import parse_model_options
    from fairseq_smoe.translation.model import SMoETransformer

    options = [
        *("--arch", "smoe_transformer", "--moe-freq", "0", "--share-all-embeddings"),
        *("--encoder-embed-dim", args.embed_dim, "--encoder-ffn-embed-dim", args.ffn_dim),
        *("--encoder-layers", args.layers, "--decoder-layers", args.layers),
        *words,
    ]
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    torch.manual_seed(args.seed)
    return SMoETransformer.build_model(parse_model_options(list(map(str, options))), task).eval()


if __name__ == "__main__":
    main()
