"""Take a trained model to another runtime."""

from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.inference.card_options import add_card_options


def add_arguments(parser):
    parser.epilog = "docs/export.md says what is in the folder, and which models can be exported."
    parser.add_argument(
        "model", type=Path, help="checkpoint, folder of a training, or packed model"
    )
    parser.add_argument(
        "--format",
        dest="file_format",
        required=True,
        help="transformers, for from_pretrained of Hugging Face; or ctranslate2, for dense models",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="output of prepare (default: that of the training)"
    )
    parser.add_argument(
        "--quantization",
        metavar="TYPE",
        help="type of the weights for ctranslate2: int8, float16, ... (default: float32)",
    )
    add_card_options(parser)


def run(args):
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.export.export import export
    from fairseq_smoe.inference.model_card import check_license, model_card

    check_license(args.license)
    if args.data is not None and not args.data.is_dir():
        raise OptionError(f"--data {args.data}: no such folder; give the output of prepare")
    name = args.name or args.to.name
    export(
        args.model,
        args.to,
        args.file_format,
        lambda described, model, use, library: model_card(
            described, model, args.run, name, args.license, use, library
        ),
        args.data,
        args.quantization,
    )
    size = sum(path.stat().st_size for path in args.to.iterdir())
    print(f"{args.to}: {size / 1e6:.1f} MB; its README.md says how to translate with it")
