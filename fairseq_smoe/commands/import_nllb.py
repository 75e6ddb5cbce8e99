"""Make a checkpoint of an NLLB-MoE model of Hugging Face transformers."""

from pathlib import Path


def add_arguments(parser):
    parser.epilog = "docs/export.md says how to train it on."
    parser.add_argument(
        "model",
        type=Path,
        help="folder with config.json, weights, tokenizer.json and sentencepiece.bpe.model",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--directions",
        metavar="A-B,...",
        help="to record as those of the training (default: all, between all languages)",
    )


def run(args):
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.export.nllb_import import CHECKPOINT, import_nllb

    directions = args.directions.split(",") if args.directions else None
    model = import_nllb(args.model, args.to, directions)
    number = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.to}: {number:,} parameters; translate with it, or train it on:")
    print(f"  python -m fairseq_smoe translate {args.to} --source ... --target ...")
    print(f"  fairseq-train ... --finetune-from-model {args.to / CHECKPOINT}")
