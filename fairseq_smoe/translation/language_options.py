"""The task's options about languages. Those left out are as in the checkpoint that is loaded."""

import os
from argparse import Namespace
from copy import copy

from fairseq import utils

from fairseq_smoe.checkpoints import files
from fairseq_smoe.checkpoints.data_record import DataRecord
from fairseq_smoe.errors import CheckpointError

# the options that decide which tokens are added to a sentence, and their defaults
DEFAULTS = {
    "encoder_langtok": "tgt",
    "decoder_langtok": True,
    "lang_tok_style": "multilingual",
    "langtoks_specs": ["main"],
    "lang_tok_replacing_bos_eos": False,
    "enable_lang_ids": False,
}
DICTIONARY_FILES = ("source_dict", "target_dict", "fixed_dictionary")


def record_of(args, languages, dictionaries):
    """The :class:`DataRecord` of a task.

    Args:
        args: its options, complete.
        languages: in their order.
        dictionaries: ``{language: fairseq's Dictionary}``
    """
    return DataRecord.of(dictionaries, languages, _options(args))


def find_checkpoint(args):
    """The checkpoint that fairseq will load: that of --path, or the one to resume from or to
    fine-tune; None if there is none."""
    if getattr(args, "path", None):
        return utils.split_paths(args.path)[0]
    if getattr(args, "restore_file", None) is None:
        return None
    last = args.restore_file
    if last == "checkpoint_last.pt":
        last = os.path.join(args.save_dir, last)
    candidates = (last, getattr(args, "continue_once", None), args.finetune_from_model)
    return next((path for path in candidates if path and os.path.isfile(path)), None)


def fill_in(args):
    """Fill in what the command line leaves out of a task's options: from the checkpoint that will
    be loaded, else with the defaults.

    Returns:
        The file of the checkpoint if ``args.langs`` was taken from it, else None.
    """
    path = find_checkpoint(args)
    record, trained = read_record(path) if path else (None, None)
    record = record or DataRecord(None, None, {})
    left_out = not args.langs and args.lang_dict is None
    if left_out:
        args.langs = record.languages
    saved = {**DEFAULTS, **record.options}
    if args.langtoks is None and args.encoder_langtok is None and args.decoder_langtok is None:
        args.langtoks = saved.pop("langtoks", None)
    for name in DEFAULTS:
        if getattr(args, name) is None:
            setattr(args, name, saved[name])
    _let_langtoks_decide(args)
    for name in DICTIONARY_FILES:
        file = getattr(trained, name, None)
        if getattr(args, name) is None and file and os.path.isfile(file):
            setattr(args, name, file)
    return path if left_out and args.langs else None


def _let_langtoks_decide(options):
    """fairseq goes by --langtoks if that says something about the main data."""
    if "main" in (getattr(options, "langtoks", None) or {}):
        source, target = options.langtoks["main"]
        options.encoder_langtok, options.decoder_langtok = source, target is not None


def read_record(path):
    """``(DataRecord, the task's options)`` of a checkpoint; ``(None, None)`` if it is damaged. Then
    it cannot be loaded either."""
    try:
        state = files.read(path, checked=False)
    except CheckpointError:
        return None, None
    options = (state.get("cfg") or {}).get("task") or state.get("args") or {}
    options = copy(options) if isinstance(options, Namespace) else Namespace(**options)
    record = DataRecord.in_task_state(state.get("task_state") or {})
    return record or _from_options(options), options


def _from_options(options):
    """The record of a checkpoint of an earlier version: only what its options tell."""
    _let_langtoks_decide(options)
    languages = getattr(options, "langs", None)
    return DataRecord(None, list(languages) if languages else None, _options(options))


def _options(args):
    return {n: getattr(args, n) for n in (*DEFAULTS, "langtoks") if hasattr(args, n)}
