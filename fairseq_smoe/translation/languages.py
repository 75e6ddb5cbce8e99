"""The directions and languages of a task, from its options, the data folder or a checkpoint."""

import os

from fairseq import utils

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.data_manager import all_directions, find_shards
from fairseq_smoe.translation.hyphens import HYPHENS, explain_hyphens
from fairseq_smoe.translation.language_options import fill_in
from fairseq_smoe.translation.task_files import LANGS_FILE


def complete_languages(args, from_checkpoint=False):
    """Fill in ``args.lang_pairs``, the list of languages and the options of language tokens, and
    check that they fit together.

    Args:
        from_checkpoint: the options are those of a checkpoint, hence complete.

    Raises:
        OptionError: a language is missing or the data folder does not exist.
    """
    if getattr(args, "path", None) and not (
        from_checkpoint or args.source_lang or args.target_lang
    ):
        raise OptionError("--target-lang: give --source-lang and --target-lang to translate")
    checkpoint = None if from_checkpoint else fill_in(args)
    folder = utils.split_paths(args.data)[0]
    if not os.path.isdir(folder):
        raise OptionError(f"{folder}: no such data folder; give the output of prepare")
    if args.source_lang and args.target_lang and args.lang_pairs is None:
        args.lang_pairs = f"{args.source_lang}-{args.target_lang}"
    if args.lang_pairs is None:
        split = getattr(args, "train_subset", None) or "train"
        if hyphenated := explain_hyphens(find_shards(args.data), split):
            raise OptionError(hyphenated)
        args.lang_pairs = ",".join(all_directions(args.data, split))
    if not args.lang_pairs:
        raise OptionError(
            f"{folder}: holds no training files; give the output of prepare or fairseq-preprocess, "
            "or directions with --lang-pairs"
        )
    listed_in = f"--lang-dict {args.lang_dict}"
    remedy = "list every language of the training, in the same order"
    if checkpoint is not None:
        listed_in = f"the languages of {checkpoint}, {','.join(args.langs)}"
        remedy = "leave this direction out, or start a new training in an empty --save-dir"
    elif args.langs:
        listed_in = f"--langs {','.join(args.langs)}"
    elif args.lang_dict is None:
        langs_file = os.path.join(folder, LANGS_FILE)
        if os.path.exists(langs_file):
            listed_in = f"--langs (from {langs_file})"
            args.langs = read_languages(langs_file)
    langs = args.langs or (read_languages(args.lang_dict) if args.lang_dict else None)
    pairs = args.lang_pairs.split(",") if isinstance(args.lang_pairs, str) else args.lang_pairs
    if bool(args.source_lang) != bool(args.target_lang):
        missing = "--target-lang" if args.source_lang else "--source-lang"
        raise OptionError(f"{missing}: give both --source-lang and --target-lang to translate")
    if args.source_lang:
        for option in ("source_lang", "target_lang"):
            code = getattr(args, option)
            if "-" in code:
                raise OptionError(f"--{option.replace('_', '-')} {code}: {HYPHENS}")
        pairs = [f"{args.source_lang}-{args.target_lang}"]
    for pair in pairs:
        if pair.count("-") != 1:
            raise OptionError(
                f"--lang-pairs {pair}: expected source and target joined by one hyphen, e.g. "
                f"en-de{f'; {HYPHENS}' if pair.count('-') > 1 else ''}"
            )
        for lang in pair.split("-"):
            if langs is not None and lang not in langs:
                raise OptionError(f"{listed_in}: {lang} is missing, which {pair} needs; {remedy}")


def read_languages(path):
    """The languages listed in a file, one per line."""
    if not os.path.exists(path):
        raise OptionError(f"--lang-dict {path}: no such file; list one language per line in it")
    with open(path, encoding="utf-8-sig") as handle:
        return [line.strip() for line in handle if line.strip()]
