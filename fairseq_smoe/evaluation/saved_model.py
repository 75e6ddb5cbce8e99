"""A checkpoint as a model to evaluate: its identity, its training options, and the model."""

import hashlib
import zipfile
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path

from fairseq import checkpoint_utils, tasks, utils

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.data_manager import find_pairs
from fairseq_smoe.translation.languages import read_languages
from fairseq_smoe.translation.options import SMoETransformerOptions
from fairseq_smoe.translation.task_files import LANGS_FILE


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint that has been read.

    Attributes:
        path: its file.
        state: as fairseq read it; it has ``cfg``, whatever version wrote it.
        overrides: options of the model that have been changed, ``{name: value}``.
    """

    path: Path
    state: dict
    overrides: dict = field(default_factory=dict)

    @property
    def task_options(self):
        return self.state["cfg"]["task"]

    @property
    def model_options(self):
        return self.state["cfg"]["model"]

    @property
    def num_updates(self):
        return self.state["optimizer_history"][-1]["num_updates"]

    def languages(self):
        """All languages that the model knows."""
        options = self.task_options
        if options.langs:
            return list(options.langs)
        in_data = Path(utils.split_paths(options.data)[0]) / LANGS_FILE
        for path in (options.lang_dict, in_data):
            if path and Path(path).exists():
                return read_languages(path)
        pairs = options.lang_pairs
        pairs = pairs.split(",") if isinstance(pairs, str) else pairs or []
        return sorted({language for pair in pairs for language in pair.split("-")})

    def build(self, directions):
        """``(model, task)`` for some directions. Can be called only once, because it frees the
        state.

        Raises:
            CheckpointError: the vocabulary of the data folder is not the model's.
        """
        options = copy(self.task_options)
        options.lang_pairs = list(directions)
        options.path = str(self.path)
        task = tasks.setup_task(options, from_checkpoint=True)
        (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(self.path)], task=task, state=self.state
        )
        del self.state["model"]  # the model has a copy
        model.prepare_for_inference_(cfg)
        return model, task


def read_saved_model(path, data=None, model_overrides=None):
    """Read a checkpoint.

    Args:
        path: the file.
        data: the data folder to use; None for that of the training.
        model_overrides: ``{name: value}`` of options of the model to change.

    Raises:
        OptionError: it is no checkpoint of this project's task, or the model has no such option.
    """
    known = {option.name for option in fields(SMoETransformerOptions)}
    for name in model_overrides or {}:
        if name not in known:
            raise OptionError(
                f"--model-overrides {name}: the model has no such option; write it as in "
                "fairseq-train --help, with underscores"
            )
    overrides = {**(model_overrides or {}), "source_lang": None, "target_lang": None}
    if data is not None:
        overrides["data"] = str(data)
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
    except (OSError, KeyError) as error:
        raise OptionError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}); give one that "
            "fairseq-train has written whole"
        ) from error
    name = getattr(state["cfg"]["task"], "_name", None)
    if name != "smoe_translation":
        raise OptionError(
            f"{path}: was trained with --task {name}; this needs smoe_translation, "
            "fairseq-generate takes any"
        )
    state.pop("last_optimizer_state", None)  # twice as large as the model
    return SavedModel(Path(path), state, model_overrides or {})


def identify(path):
    """The identity of a checkpoint, without reading all of it.

    Returns:
        ``{"file", "size", "contents"}``; ``contents`` is a hash of the checksums of all parts.
    """
    digest = hashlib.sha256()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                digest.update(f"{part.filename} {part.file_size} {part.CRC}\n".encode())
    else:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
    path = Path(path)
    return {"file": path.name, "size": path.stat().st_size, "contents": digest.hexdigest()}


def trained_directions(saved):
    """The directions that the model was trained in.

    Raises:
        OptionError: the checkpoint does not tell.
    """
    pairs = saved.task_options.lang_pairs
    pairs = pairs.split(",") if isinstance(pairs, str) else pairs
    if not pairs:
        raise OptionError(f"{saved.path}: names no directions; give them with --directions")
    return list(pairs)


def subsets_in(folder):
    """Names of the splits that a data folder has binarised files of."""
    splits = {path.name.split(".")[0] for path in Path(folder).glob("*.*-*.*.idx")}
    return sorted(split for split in splits if find_pairs(folder, split))
