"""Put all that translation needs into one folder."""

from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.inference.card_options import add_card_options


def add_arguments(parser):
    parser.epilog = "docs/translate.md says what is in the folder."
    parser.add_argument("model", type=Path, help="checkpoint, or folder of a training")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="instead: compare a packed model with its checksums",
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="output of prepare (default: that of the training)"
    )
    add_card_options(parser)


def run(args):
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.inference import packed
    from fairseq_smoe.inference.model_card import check_license, model_card

    if args.verify:
        packed.verify(args.model)
        print(f"{args.model}: complete, all checksums agree")
        return
    if args.to is None:
        raise OptionError("--to: give the folder to make")
    check_license(args.license)
    name = args.name or args.to.name
    packed.pack(
        args.model,
        args.to,
        lambda described, model: model_card(described, model, args.run, name, args.license),
        args.data,
    )
    size = sum(path.stat().st_size for path in args.to.iterdir())
    print(f"{args.to}: {size / 1e6:.1f} MB; translate with it:")
    print(f"  python -m fairseq_smoe translate {args.to} --source ... --target ...")
