"""Values and combinations of fairseq's options that cannot work, before anything is loaded."""

import ast
import os
from argparse import ArgumentTypeError
from dataclasses import fields
from importlib.util import find_spec

import torch
from fairseq.registry import REGISTRIES
from omegaconf import MISSING

from fairseq_smoe.errors import OptionError

FRACTIONS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "relu_dropout",
    "encoder_layerdrop",
    "decoder_layerdrop",
    "label_smoothing",
    "quant_noise_pq",
)
COUNTS = (
    "beam",
    "upsample_primary",
    "virtual_epoch_size",
    "virtual_data_size",
    "required_seq_len_multiple",
    "required_batch_size_multiple",
)
FILES = (
    "encoder_embed_path",
    "decoder_embed_path",
    "source_dict",
    "target_dict",
    "fixed_dictionary",
    "sampling_weights_from_file",
)
# what some choices import
PACKAGES = {
    ("tokenizer", "moses"): "sacremoses",
    ("tokenizer", "nltk"): "nltk",
    ("bpe", "bert"): "transformers",
    ("bpe", "hf_byte_bpe"): "tokenizers",
    ("bpe", "subword_nmt"): "subword_nmt",
    ("bpe", "fastbpe"): "fastBPE",
    ("scoring", "bert_score"): "bert_score",
    ("scoring", "meteor"): "nltk",
    ("scoring", "wer"): "editdistance",
    ("use_plasma_view", True): "pyarrow",
    ("write_checkpoints_asynchronously", True): "iopath",
}


def check_choices(args):
    """Refuse text processing and scores of which something is missing."""
    for (name, value), package in PACKAGES.items():
        if getattr(args, name, None) == value and find_spec(package) is None:
            raise OptionError(f"{flag(name, value)}: needs the package {package}; install it first")
    if (bpe := getattr(args, "bpe", None)) is None:
        return
    options = REGISTRIES["bpe"]["dataclass_registry"].get(bpe)
    if options is None:
        raise OptionError(f"--bpe {bpe}: fairseq has no options for it; give sentencepiece")
    for option in fields(options):
        if getattr(args, option.name, None) == MISSING:
            raise OptionError(f"--bpe {bpe}: give {flag(option.name, True)}, too")


def check_data(args):
    """Refuse impossible values of the options that choose the data."""
    for name in FILES:
        path = getattr(args, name, None)
        if path is not None and not os.path.isfile(path):
            raise OptionError(f"{flag(name, path)}: no such file; give the path of another")
    if args.dataset_impl not in (None, "mmap", "lazy", "cached"):
        raise OptionError(
            f"--dataset-impl {args.dataset_impl}: data folders of this task are binarised; leave "
            "it out, the format is recognised"
        )
    for name in FRACTIONS:
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < 1:
            raise OptionError(f"{flag(name, value)}: expected a fraction from 0 up to, but not, 1")
    for name in COUNTS:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise OptionError(f"{flag(name, value)}: expected 1 or more")
    if args.sampling_temperature <= 0:
        raise OptionError(
            f"--sampling-temperature {args.sampling_temperature}: expected more than 0"
        )
    without_gpu = getattr(args, "cpu", False) or not torch.cuda.is_available()
    if getattr(args, "quant_noise_scalar", 0) > 0 and without_gpu:
        raise OptionError(
            f"--quant-noise-scalar {args.quant_noise_scalar}: needs a GPU; leave it out"
        )
    extra, of_pairs = args.extra_data or {}, args.extra_lang_pairs or {}
    for name in extra.keys() ^ of_pairs.keys():
        given, missing = "--extra-data", "--extra-lang-pairs"
        if name in of_pairs:
            given, missing = missing, given
        raise OptionError(f"{given} {name}: give {missing} for it, too")
    for name in extra:
        if name.startswith("mono_"):
            raise OptionError(
                f"--extra-data {name}: text in one language is not read; translate it back with "
                "fairseq-generate, and give both sides"
            )
    if hasattr(args, "max_update") and not args.disable_validation:
        if args.train_subset in args.valid_subset.split(","):
            raise OptionError(
                f"--train-subset {args.train_subset}: is also validated; name another set with "
                "--valid-subset, or give --disable-validation"
            )


def check_search(args):
    """Refuse impossible combinations of the options of the search."""
    kinds = [
        flag(name, getattr(args, name))
        for name, off in (
            ("sampling", False),
            ("diverse_beam_groups", -1),
            ("match_source_len", False),
            ("diversity_rate", -1),
            ("constraints", None),
            ("score_reference", False),
        )
        if getattr(args, name) != off
    ]
    groups = args.diverse_beam_groups
    wrong = (
        (
            not 1 <= args.nbest <= args.beam,
            "nbest",
            f"expected 1 to {args.beam}, the value of --beam",
        ),
        (
            args.sampling and args.nbest != args.beam,
            "sampling",
            f"draws --beam {args.beam} translations; give --nbest {args.beam}, too",
        ),
        *(
            (getattr(args, name) > 0 and not args.sampling, name, "give --sampling, too")
            for name in ("sampling_topk", "sampling_topp")
        ),
        (args.temperature <= 0, "temperature", "expected more than 0"),
        (
            groups == 0 or (groups > 0 and args.beam % groups != 0),
            "diverse_beam_groups",
            f"expected a divisor of --beam {args.beam}",
        ),
        (
            args.replace_unk is not None and args.score_reference,
            "score_reference",
            "scores the words that are there; leave out --replace-unk",
        ),
        (
            args.scmoe_beta is not None and args.score_reference,
            "score_reference",
            "scores words that are given, without contrast; leave out --scmoe-beta",
        ),
        (
            not 0 <= args.shard_id < args.num_shards,
            "shard_id",
            f"expected 0 to {args.num_shards - 1}, one less than --num-shards",
        ),
        (
            args.print_alignment == "soft" and hasattr(args, "buffer_size"),
            "print_alignment",
            "use fairseq-generate, or --print-alignment hard",
        ),
    )
    if len(kinds) > 1:
        raise OptionError(f"{' and '.join(kinds)}: are different searches; give one of them")
    for is_wrong, name, expected in wrong:
        if is_wrong:
            raise OptionError(f"{flag(name, getattr(args, name))}: {expected}")


def flag(name, value):
    """``"--lm-path lm.pt"``, as it stands on the command line."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return option if value is True else f"{option} {value}"


def python_dictionary(text):
    """The type of options such as --langtoks.

    Raises:
        ArgumentTypeError: it is something else; argparse adds the name of the option.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text}: expected a Python dictionary in quotes")
    return value
