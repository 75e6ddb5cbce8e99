"""Add languages or experts to a trained model.

The text of the new languages is prepared as by 'prepare', whose options may be given as well
(--splits, --clean, --workers, ...). DIR/data then has it and the text of the training beside it.
DIR/checkpoint.pt is the model with what is new. It translates as before until it is trained on.
"""

import argparse
import os
import shutil
from pathlib import Path

from fairseq_smoe.errors import OptionError

PASSES_ON_OPTIONS = True
CHECKPOINT, DATA = "checkpoint.pt", "data"
# options of prepare, and how they are called here
OTHER_NAMES = {"--from": "--with-text", "--vocab-size": "--new-pieces", "--vocabulary-of": "--data"}


def add_arguments(parser):
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "docs/finetune.md says how to go on from there."
    add = parser.add_argument
    add("checkpoint", type=Path, help="the trained model, or folder of a training")
    add("--to", type=Path, required=True, metavar="DIR", help="folder to write")
    add(
        "--with-text",
        nargs="+",
        metavar="PATH",
        help="folders or archives with parallel text, as of 'prepare --from'",
    )
    add(
        "--pairs", metavar="A-B,...", help="language pairs of that text, each with a new language"
    )
    add("--data", type=Path, metavar="DIR", help="data folder of the training (default: as it was)")
    add(
        "--new-pieces",
        type=int,
        default=4000,
        metavar="N",
        help="size of the SentencePiece model of each new language; those of its pieces that the "
        "vocabulary lacks are added. 0: add none (default: %(default)s)",
    )
    add(
        "--initial",
        choices=("spelling", "mean"),
        default="spelling",
        help="what a new piece begins as: the mean of the old pieces that spell it, or of all "
        "(default: %(default)s)",
    )
    add(
        "--like",
        metavar="LANG",
        help="language that new ones are similar to: their tokens begin as its token (default: the "
        "mean of all languages)",
    )
    add(
        "--add-experts",
        metavar="STRATUM:N,...",
        help="add experts to strata, which begin as copies of those that are there: 2:4 adds four "
        "to the second stratum",
    )
    add(
        "--expert-noise",
        type=float,
        default=0.01,
        metavar="S",
        help="standard deviation of what is added to the numbers of new experts, relative to their "
        "root mean square in a tensor (default: %(default)s)",
    )
    add(
        "--without-old-text",
        action="store_true",
        help="leave the text of the training out of DIR/data, instead of linking or copying it",
    )


def run(args):
    output, data = args.to / CHECKPOINT, args.to / DATA
    if output.exists():
        raise OptionError(f"--to {args.to}: has a {CHECKPOINT}; choose another")
    if args.new_pieces < 0:
        raise OptionError(f"--new-pieces {args.new_pieces}: expected 0 or more")
    if bool(args.with_text) != bool(args.pairs) or not (args.pairs or args.add_experts):
        raise OptionError("--with-text: give text and --pairs to add languages, or --add-experts")
    from fairseq_smoe.evaluation import set_up_fairseq

    set_up_fairseq()
    from fairseq_smoe.checkpoints import files
    from fairseq_smoe.checkpoints.transform import replace
    from fairseq_smoe.conversion.extend import add_tokens
    from fairseq_smoe.conversion.more_experts import add_experts
    from fairseq_smoe.conversion.source import Source
    from fairseq_smoe.inference.sources import find_checkpoint
    from fairseq_smoe.moe.strata import format_strata
    from fairseq_smoe.translation.untrained_experts import parse_untrained_experts

    numbers = parse_untrained_experts(args.add_experts or "", "--add-experts")
    source = Source(find_checkpoint(args.checkpoint))
    facts = []
    if numbers:
        strata = add_experts(source, numbers, args.expert_noise)
        facts.append(f"{sum(numbers.values())} new experts, --smoe-strata {format_strata(strata)}")
    if args.pairs:
        _prepare(args, source, data)
        number = add_tokens(source, data, args.initial, args.like)
        facts.append(f"{number:,} new tokens")
    try:
        replace(files.write, source.result(), output)
    except OSError as error:
        raise OptionError(f"{error.filename or output}: {error.strerror or error}") from error
    print(f"{output}: {', '.join(facts)}; it translates as before. To train it on:")
    print(f"fairseq-train {data if args.pairs else 'DATA'} --finetune-from-model {output} ...")


def _prepare(args, source, data):
    """Prepare the text of new languages, beside that of the training."""
    from fairseq_smoe.preparation.progress import prepare

    old_data = args.data or _data_of(source)
    try:
        _check_pairs(args.pairs, source, old_data)
        prepare(_prepare_options(args, data, old_data))
    except OptionError as error:
        message = str(error)
        for theirs, ours in OTHER_NAMES.items():
            message = message.replace(theirs, ours)
        raise OptionError(message) from error
    if not args.without_old_text:
        link_text(old_data, data)


def _data_of(source):
    folder = source.task_option("data")
    folder = Path(folder.split(os.pathsep)[0]) if folder else None
    if folder is None or not folder.is_dir():
        raise OptionError(
            f"--data: {source.path} was trained with {folder}, which is not there; give its folder"
        )
    return folder


def _check_pairs(text, source, data):
    """Raises:
    OptionError: a pair has no new language.
    """
    from fairseq_smoe.preparation.extended_vocabulary import read_base
    from fairseq_smoe.preparation.plan import parse_pairs

    known = read_base(data).languages
    for pair in parse_pairs(text):
        if all(lang in known for lang in pair.split("-")):
            raise OptionError(
                f"--pairs {pair}: {source.path} knows both languages; to train it on more text of "
                "them, see docs/finetune.md"
            )


def _prepare_options(args, data, old_data):
    from fairseq_smoe.preparation.options import add_arguments as add_prepare_arguments

    parser = argparse.ArgumentParser(prog="python -m fairseq_smoe extend", allow_abbrev=False)
    add_prepare_arguments(parser)
    own = ["--from", *args.with_text, "--pairs", args.pairs, "--to", str(data)]
    own += ["--vocabulary-of", str(old_data), "--vocab-size", str(args.new_pieces)]
    return parser.parse_args([*args.more, *own])


def link_text(old, new):
    """Let the binary files and the text of a data folder be in another one as well: as links where
    the file system has them, else as copies. Files that are there stay."""
    for pattern in ("*.*-*.*.*", "shard*/*.*-*.*.*"):
        for path in sorted(old.glob(pattern)):
            target = new / path.relative_to(old)
            if path.suffix not in (".bin", ".idx", ".txt") or target.exists():
                continue
            target.parent.mkdir(exist_ok=True)
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
