"""Options of commands that write a model card."""

from pathlib import Path


def add_card_options(parser):
    """Add the arguments that say what the card tells, besides what the checkpoint does."""
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="folder of the training, with the evaluation and the command for the model card "
        "(default: the folder of the checkpoint, or the one above)",
    )
    parser.add_argument("--name", help="of the model, for its card (default: that of the folder)")
    parser.add_argument(
        "--license", default="unknown", metavar="ID", help="for the card, as the Hugging Face hub "
        "names licences: mit, cc-by-4.0, ... (default: %(default)s)"
    )  # fmt: skip
