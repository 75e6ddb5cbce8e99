"""The time of self-contrast decoding (--scmoe-beta), relative to plain decoding of the same model.

    python scripts/bench_contrast.py CHECKPOINT DATA --direction msa-eng --to results/bench_contrast

Translates the first sentences of a held-out text with both, in turns, in one process. The model has
to have learned something: the fewer tokens it finds possible, the less there is to contrast.
"""

import argparse
import logging
import warnings
from argparse import Namespace

import torch
from benchmarking import add_common_options, in_turns, publish, quartiles, told
from tqdm import tqdm

import fairseq_smoe


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="of a model with experts")
    parser.add_argument("data", help="folder that prepare has made")
    parser.add_argument("--direction", required=True, metavar="A-B", help="source-target")
    parser.add_argument("--subset", default="test1", help="(default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--beta", type=float, default=0.5, help="(default: %(default)s)")
    parser.add_argument(
        "--beam", type=int, nargs="+", default=[1, 5], help="beam sizes (default: 1 5)"
    )
    parser.add_argument("--max-tokens", type=int, default=2000, help="(default: %(default)s)")
    add_common_options(parser, rounds=5)
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    fairseq_smoe.register()
    torch.set_num_threads(args.threads)
    task, model, batches = load(args)
    results = []
    with tqdm(total=len(args.beam) * args.rounds, unit="round") as progress:
        for beam in args.beam:
            progress.set_description(f"beam {beam}")
            results.append(compare(task, model, batches, beam, args, progress))
    lines = [
        f"| {args.sentences} sentences, {args.direction}, beta {args.beta} | time relative to plain "
        "decoding (quartiles) | tokens relative to plain decoding |\n|---|---:|---:|"
    ]
    for r in results:
        time = told(r["time"], *r["quartiles"])
        lines.append(f"| beam {r['beam']} | {time} | {r['tokens']:.2f} |")
    publish("\n".join(lines), args, {"results": results}, None)


def load(args):
    """``(task, model, batches)``, the model in evaluation mode."""
    from fairseq import checkpoint_utils, utils

    use_cuda = torch.cuda.is_available() and not args.cpu
    source, target = args.direction.split("-")
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.checkpoint],
        arg_overrides={"data": args.data, "source_lang": source, "target_lang": target},
    )
    task.load_dataset(args.subset, task_cfg=cfg.task)
    dataset = task.dataset(args.subset)
    first = sorted(range(min(args.sentences, len(dataset))), key=dataset.num_tokens)
    plan = dataset.batch_by_size(first, max_tokens=args.max_tokens)
    batches = [dataset.collater([dataset[i] for i in batch]) for batch in plan]
    model = model.cuda() if use_cuda else model
    return task, model.eval(), [utils.move_to_cuda(b) if use_cuda else b for b in batches]


def compare(task, model, batches, beam, args, progress):
    tokens = {}

    def job(name, **options):
        settings = {"beam": beam, "max_len_a": 1, "max_len_b": 50, **options}
        generator = task.build_generator([model], Namespace(**settings))

        def translate():
            found = [
                hypotheses[0]
                for batch in batches
                for hypotheses in task.inference_step(generator, [model], batch)
            ]
            tokens[name] = sum(len(hypothesis["tokens"]) for hypothesis in found)

        return translate

    plain, contrast = job("plain"), job("contrast", scmoe_beta=args.beta)
    ratios = [1 / ratio for ratio in in_turns(plain, contrast, args.rounds, progress)]
    low, median, high = quartiles(ratios)
    return {
        "beam": beam,
        "time": median,
        "quartiles": [low, high],
        "tokens": tokens["contrast"] / tokens["plain"],
    }


if __name__ == "__main__":
    main()
