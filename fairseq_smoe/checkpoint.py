"""Look at checkpoints, and make others of them: whole, in parts, averaged, without the optimizer."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.checkpoint_layout import describe_gates, gate_sizes
from fairseq_smoe.checkpoints import files, transform
from fairseq_smoe.checkpoints.parts import Parted, is_expert_parameter, read_checkpoint
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

    sub = add("split", "put the experts into parts, as so many processes would have written", split)
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
    sub.add_argument("--to", type=Path, required=True, metavar="OUTPUT")
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
    args.run_action(args)


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


def describe(path):
    """What a checkpoint is: ``{name: value}`` of plain types."""
    state = read_checkpoint(path)
    model = state["model"]
    history = (state.get("optimizer_history") or [{}])[-1]
    extra = state.get("extra_state") or {}
    options = (state.get("cfg") or {}).get("model")
    sizes = gate_sizes(model)
    experts = {name: value for name, value in model.items() if is_expert_parameter(name)}
    parted = [value for value in experts.values() if isinstance(value, Parted)]
    num_experts = sum(map(_size, experts.values()))
    return {
        "architecture": getattr(options, "arch", None) or getattr(options, "_name", None),
        "experts": describe_gates(next(iter(sizes.values()), ())),
        "expert blocks": len(sizes),
        "parameters": sum(map(_size, model.values())),
        "of experts": num_experts,
        "parts": len(parted[0].tensors) if parted else 1,
        "type": str(next(iter(model.values())).dtype).removeprefix("torch."),
        "updates": history.get("num_updates"),
        "epoch": (extra.get("train_iterator") or {}).get("epoch"),
        "validation loss": extra.get("val_loss"),
        "best so far": extra.get("best"),
        "optimizer": history.get("optimizer_name") if state.get("last_optimizer_state") else "none",
    }


def _size(value):
    size = 1
    for width in value.shape:
        size *= width
    return size


def merge(args):
    _write(transform.merged(read_checkpoint(args.input)), args.output)


def split(args):
    state = read_checkpoint(args.input)
    transform.write_in_parts(state, args.parts, args.output)
    print(args.output)


def strip(args):
    _write(transform.stripped(read_checkpoint(args.input)), args.output)


def average(args):
    paths = args.inputs
    if args.last is not None:
        if len(paths) != 1 or not paths[0].is_dir():
            raise OptionError(f"--last {args.last}: give one folder of checkpoints with it")
        paths = transform.last_checkpoints(paths[0], args.last, args.epochs)
    elif any(path.is_dir() for path in paths):
        raise OptionError(f"{paths[0]}: is a folder; say how many of its checkpoints with --last N")
    print("\n".join(map(str, paths)), file=sys.stderr)
    _write(transform.averaged(tqdm(paths, unit="checkpoint", disable=None)), args.to)


def _write(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(state, path)
    print(path)
