"""Make a trained model into another one, that every command takes as it takes any checkpoint."""

import importlib
import warnings
from pathlib import Path

from fairseq_smoe.errors import OptionError

# kind -> what it does. The module of that name beside this file has add_arguments(parser),
# check(args), which raises OptionError, and convert(source, args), which changes the
# conversion.source.Source in place and returns a conversion.report.Report
KINDS = {
    "moefy": "split FFNs into small experts, of which each token computes the best (MoEfication)",
    "pesc": "put adapters on the FFNs of a dense model; it translates as before until trained on",
    "upcycle": "make experts of copies of a dense model's FFNs; it translates as before, too",
    "factorise": "turn experts into products of small tensors and one that they share (MPOE)",
    "merge-experts": "fewer experts: those that are alike are grouped and merged",
}


def add_arguments(parser):
    parser.description = __doc__
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, text in KINDS.items():
        sub = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("checkpoint", type=Path, help="the trained model; it is not changed")
        sub.add_argument(
            "output",
            type=Path,
            help="the new checkpoint, in one file and without the optimizer's state; a report is "
            "written beside it",
        )
        sub.add_argument("--force", action="store_true", help="replace OUTPUT if it is there")
        _module(name).add_arguments(sub)


def _module(kind):
    return importlib.import_module(f"{__name__}.{kind.replace('-', '_')}")


def run(args):
    # check the options before fairseq is imported, which takes seconds
    output, kind = args.output, _module(args.kind)
    if output.is_dir():
        raise OptionError(f"{output}: is a folder; give the name of a file in it")
    if output.exists():
        if args.checkpoint.exists() and output.samefile(args.checkpoint):
            raise OptionError(f"{output}: is the checkpoint to convert; give another name")
        if not args.force:
            raise OptionError(f"{output}: exists; give another name, or --force to replace it")
    kind.check(args)
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
    from fairseq_smoe.checkpoints import files
    from fairseq_smoe.checkpoints.transform import replace
    from fairseq_smoe.conversion.source import Source

    source = Source(args.checkpoint)
    report = kind.convert(source, args)
    report.facts["training_options"] = source.flags()
    try:
        replace(files.write, source.result(), output)
        paths = [output, *report.write(output)]
        report.remove()
    except OSError as error:
        raise OptionError(f"{error.filename or output}: {error.strerror or error}") from error
    print(*report.lines, *paths, sep="\n")
    print(f"to train it on: fairseq-train ... --finetune-from-model {output} {source.flags()}")
