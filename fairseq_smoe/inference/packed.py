"""A folder with all that translation needs: ``python -m fairseq_smoe pack``.

======================  ===========================================================================
``model.safetensors``   the parameters
``config.json``         options of model and task, languages, directions, tensors that are the same
``dict.txt``            the dictionary
``spm.model``           the SentencePiece model; ``spm.LANGUAGE.model`` of an added language
``README.md``           the model card
``SHA256SUMS``          checksums, as of ``sha256sum``
======================  ===========================================================================
"""

import hashlib
import json
import shutil
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from enum import Enum
from pathlib import Path

from fairseq_smoe import __version__
from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import require_new_folder, whole_file, whole_folder, write_whole
from fairseq_smoe.inference.sources import Described, Loaded, read_checkpoint
from fairseq_smoe.translation.task_files import SPM_FILE, sentencepiece_file

WEIGHTS, CONFIG, DICTIONARY = "model.safetensors", "config.json", "dict.txt"
CARD, SUMS = "README.md", "SHA256SUMS"
# of the task, besides languages and files: which tokens are added where
TASK_OPTIONS = (
    *("encoder_langtok", "decoder_langtok", "lang_tok_style", "langtoks_specs", "langtoks"),
    *("lang_tok_replacing_bos_eos", "enable_lang_ids", "left_pad_source", "left_pad_target"),
    *("max_source_positions", "max_target_positions", "truncate_source"),
)
FORMAT = 1


def is_packed(path):
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def pack(checkpoint, target, make_card, data=None):
    """Write a packed model.

    Args:
        checkpoint: see :func:`~fairseq_smoe.inference.sources.find_checkpoint`.
        target: folder to make. It is complete or absent.
        make_card: ``make_card(described, model)`` returns the text of the model card; the first is
            a :class:`~fairseq_smoe.inference.sources.Described`.
        data: see :func:`~fairseq_smoe.inference.sources.find_data`.

    Raises:
        OptionError: the folder exists, or languages have different dictionaries.
    """
    from safetensors.torch import save

    from fairseq_smoe.evaluation.saved_model import trained_directions

    require_new_folder(target)
    saved, folder = read_checkpoint(checkpoint, data)
    directions = trained_directions(saved)
    tensors, same = _without_copies(saved.state["model"])
    config = {
        "format": FORMAT,
        "fairseq_smoe": __version__,
        "updates": saved.num_updates,
        "languages": saved.languages(),
        "directions": directions,
        "model": _model_options(saved.model_options),
        "task": {name: getattr(saved.task_options, name) for name in TASK_OPTIONS},
        "same": same,
    }
    model, task = saved.build(directions)
    dictionary = joint_dictionary(task, saved.path)
    card = make_card(Described.of(saved), model)
    with whole_folder(target) as part:
        with whole_file(part / WEIGHTS) as file:
            file.write(save(tensors))
        write_whole(part / CONFIG, json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        models = {sentencepiece_file(folder, lang) for lang in saved.languages()}
        for path in models | {folder / SPM_FILE}:
            shutil.copyfile(path, part / path.name)
        dictionary.save(str(part / DICTIONARY))
        write_whole(part / CARD, card)
        names = sorted(path.name for path in part.iterdir())
        sums = "".join(f"{checksum(part / name)}  {name}\n" for name in names)
        write_whole(part / SUMS, sums)


def load(folder):
    """The :class:`~fairseq_smoe.inference.sources.Loaded` of a packed model.

    Raises:
        OptionError: a file is missing or damaged, or of a later version.
    """
    from fairseq import tasks
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder)
    options = _task_namespace(config["task"], folder)
    options.fixed_dictionary = str(folder / DICTIONARY)
    options.langs, options.lang_pairs = config["languages"], list(config["directions"])
    try:
        task = tasks.setup_task(options, from_checkpoint=True)
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"{folder}: is damaged ({error}); pack the model again") from error
    for name, kept in config["same"].items():
        state[name] = state[kept]
    model_options = Namespace(**config["model"], arch="smoe_transformer")
    model = task.build_model(model_options, from_checkpoint=True)
    model.load_state_dict(state, strict=True, model_cfg=model_options)
    model.prepare_for_inference_(Namespace(generation=Namespace(no_beamable_mm=True)))
    directions = [tuple(direction.split("-")) for direction in config["directions"]]
    described = Described(
        folder, model_options, config["updates"], config["languages"], list(config["directions"])
    )
    return Loaded([model], task, folder / SPM_FILE, directions, described)


def verify(folder):
    """Compare all files with their checksums.

    Raises:
        OptionError: names the first file that is missing or another.
    """
    folder = Path(folder)
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        raise OptionError(f"{folder}: has no {SUMS}; is it a packed model?") from None
    for line in lines:
        expected, name = line.split("  ", 1)
        if not (folder / name).is_file():
            raise OptionError(f"{folder / name}: is missing; copy the folder again")
        if checksum(folder / name) != expected:
            raise OptionError(f"{folder / name}: is not what was packed; copy the folder again")


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(folder):
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise OptionError(
                f"{path}: format {config['format']}, and this version reads up to {FORMAT}; "
                "install a newer fairseq-smoe"
            )
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path}: is damaged ({error}); pack the model again") from error


def _without_copies(state):
    """Tensors with memory of their own, and ``{name: name of the same tensor}`` of the others."""
    names, tensors, same = {}, {}, {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and place in names:
            same[name] = names[place]
        else:
            names[place] = name
            tensors[name] = tensor.contiguous()
    return tensors, same


def _model_options(options):
    """All options of the model, as JSON can hold them."""
    from fairseq_smoe.translation.options import SMoETransformerOptions

    found = {f.name: getattr(options, f.name, f.default) for f in fields(SMoETransformerOptions)}
    return {name: str(v) if isinstance(v, Enum) else v for name, v in found.items()}


def _task_namespace(options, folder):
    """The options of a task for translation."""
    from fairseq_smoe.translation.task import SMoETranslationTask

    parser = ArgumentParser(add_help=False)
    SMoETranslationTask.add_args(parser)
    return parser.parse_args([str(folder)], Namespace(**options, task="smoe_translation", seed=1))


def joint_dictionary(task, checkpoint):
    """The dictionary of all languages of a task.

    Raises:
        OptionError: languages have different ones.
    """
    first, *others = task.dicts.values()
    if any(other.symbols != first.symbols for other in others):
        raise OptionError(
            f"{checkpoint}: its languages have different dictionaries, which cannot be packed; "
            "train with one for all"
        )
    return first
