"""``python -m fairseq_smoe COMMAND``: the commands that fairseq does not have."""

import argparse
import importlib
import sys

from fairseq_smoe.errors import OneLineError

# subcommand -> what it does. The module of that name in commands/, with underscores, has
# add_arguments(parser) and run(args). Unknown options are an error, unless the module has
# PASSES_ON_OPTIONS = True and reads them from args.more
COMMANDS = {
    "path": "print the folder to give to --user-dir",
    "doctor": "check what is installed, the GPUs, and that training and translation work",
    "catalogues": "turn translation catalogues into parallel text",
    "prepare": "turn parallel text into a folder that fairseq-train reads",
    "train": "train a row of one of the paper's tables",
    "translate": "translate text with a trained model, line by line",
    "evaluate": "translate and score all directions, loading the model once",
    "tabulate": "tabulate scores of several models beside the paper's",
    "analyse": "count requested capacity per direction, block and token type",
    "plot": "draw requested capacity, experts and training curves",
    "checkpoint": "inspect, merge, split, strip and average checkpoints",
    "extend": "add languages or experts to a trained model",
    "convert": "make a trained model into a mixture of experts, or into a smaller one",
    "serve": "serve translations over HTTP, with a page for the browser",
    "pack": "put all that translation needs into one folder",
    "export": "take a trained model to Hugging Face transformers or CTranslate2",
    "import-nllb": "make a checkpoint of an NLLB-MoE model of Hugging Face transformers",
    "flops": "print parameters and FLOPs of every row of a table",
    "scaling": "compute what ranks send and hold when they share experts",
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m fairseq_smoe", description="What fairseq's own commands do not do."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = sys.argv[1:] if argv is None else argv
    modules = {}
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        # import only what is asked for: some commands need fairseq or matplotlib
        if argv[:1] == [name]:
            modules[name] = importlib.import_module(
                f"fairseq_smoe.commands.{name.replace('-', '_')}"
            )
            modules[name].add_arguments(subparser)
    args, args.more = parser.parse_known_args(argv)
    if args.more and not getattr(modules[args.command], "PASSES_ON_OPTIONS", False):
        parser.error(f"unrecognized arguments: {' '.join(args.more)}")
    try:
        modules[args.command].run(args)
    except OneLineError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)  # what shells report of a command that Ctrl-C has ended


if __name__ == "__main__":
    main()
