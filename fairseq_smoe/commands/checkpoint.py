"""Inspect checkpoints, and make others from them: merged, split, averaged, stripped."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.checkpoints import files, transform
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.parts import read_checkpoint, whole
from fairseq_smoe.errors import OptionError


def add_arguments(parser):
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name, text, action):
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run_action=action)
        return sub

    sub = add("inspect", "say what a checkpoint is", inspect)
    sub.add_argument("checkpoint", type=Path, nargs="+")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = add("merge", "put the parts of a checkpoint into one file, to move or to share", merge)
    _add_files(sub)

    sub = add("split", "put the experts into parts, as N processes would have written them", split)
    _add_files(sub)
    sub.add_argument("--parts", type=int, required=True, help="a divisor of the number of experts")

    sub = add("strip", "leave out the optimizer's state, which takes most of the file", strip)
    _add_files(sub)

    sub = add("average", "the mean of the parameters of several checkpoints", average)
    sub.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        metavar="INPUT",
        help="checkpoints, or one folder of them and --last",
    )
    sub.add_argument("--to", type=Path, required=True, dest="output", metavar="OUTPUT")
    sub.add_argument(
        "--last", type=int, metavar="N", help="the last N of the folder, by their updates"
    )
    sub.add_argument(
        "--epochs",
        action="store_true",
        help="with --last: those of ends of epochs, checkpoint5.pt (default: those in between, "
        "checkpoint_1_500.pt, where there are any)",
    )


def run(args):
    output = getattr(args, "output", None)
    if output is not None and output.is_dir():  # detect it before the work is done
        raise OptionError(f"{output}: is a folder; give the name of a file in it")
    try:
        args.run_action(args)
    except OSError as error:
        raise OptionError(f"{error.filename or output}: {error.strerror or error}") from error


def _add_files(parser):
    parser.add_argument("input", type=Path, metavar="INPUT")
    parser.add_argument("output", type=Path, metavar="OUTPUT")


def inspect(args):
    facts = {str(path): describe(path) for path in args.checkpoint}
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for path, values in facts.items():
        print(path)
        for name, value in values.items():
            print(f"  {name:<24}{value}")


def merge(args):
    _write(files.write, whole(read_checkpoint(args.input)), args.output)


def split(args):
    def write(state, path):
        transform.write_in_parts(state, args.parts, path)

    _write(write, read_checkpoint(args.input), args.output)


def strip(args):
    _write(files.write, transform.stripped(read_checkpoint(args.input)), args.output)


def average(args):
    paths = args.inputs
    folders = [path for path in paths if path.is_dir()]
    if args.last is not None:
        if paths != folders or len(paths) != 1:
            raise OptionError(
                f"--last {args.last}: expected one folder of checkpoints, not "
                f"{' '.join(map(str, paths))}"
            )
        paths = transform.last_checkpoints(paths[0], args.last, args.epochs)
        print("\n".join(map(str, paths)), file=sys.stderr)
    elif args.epochs:
        raise OptionError("--epochs: give it with --last N, to say how many")
    elif folders:
        raise OptionError(f"{folders[0]}: is a folder; say how many of its files with --last N")
    state = transform.averaged(tqdm(paths, unit="checkpoint", disable=None))
    _write(files.write, state, args.output)


def _write(write, state, path):
    transform.replace(write, state, path)
    print(path)
