"""Where the files of a trained model are."""

from dataclasses import dataclass
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.task_files import SPM_FILE

NAMES = ("checkpoint_best.pt", "checkpoint_last.pt")  # in the order in which they are taken


@dataclass(frozen=True)
class Described:
    """What is known of a trained model besides its parameters.

    Attributes:
        path: its checkpoint, or the folder of a packed model.
        options: of the model.
        num_updates: of the training.
        languages: all that it knows.
        directions: of the training, ``"en-de"``.
    """

    path: Path
    options: object
    num_updates: int
    languages: list
    directions: list

    @classmethod
    def of(cls, saved):
        """That of a :class:`~fairseq_smoe.evaluation.saved_model.SavedModel`."""
        from fairseq_smoe.evaluation.saved_model import trained_directions

        return cls(
            saved.path,
            saved.model_options,
            saved.num_updates,
            saved.languages(),
            trained_directions(saved),
        )


@dataclass(frozen=True)
class Loaded:
    """Models that translate together.

    Attributes:
        models: ready for inference.
        task: the :class:`~fairseq_smoe.translation.task.SMoETranslationTask` of all directions.
        spm: path of the SentencePiece model.
        directions: ``(source, target)`` of all directions of the training.
        described: what is known of the first model.
    """

    models: list
    task: object
    spm: Path
    directions: list
    described: Described


def read_checkpoint(path, data=None):
    """A checkpoint, and the folder with its dictionary and SentencePiece model.

    Returns:
        ``(SavedModel, folder)``

    Raises:
        OptionError: a file is missing.
    """
    from fairseq_smoe.evaluation.saved_model import read_saved_model

    checkpoint = find_checkpoint(path)
    saved = read_saved_model(checkpoint)
    folder = find_data(checkpoint, saved.task_options, data)
    saved.task_options.data = str(folder)
    return saved, folder


def find_checkpoint(path):
    """The checkpoint that a path means: itself, or the best one in the folder of a training.

    Raises:
        OptionError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise OptionError(f"{path}: no such file or folder")
    for folder in (path, path / "checkpoints"):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    raise OptionError(
        f"{path}: neither a packed model nor a folder with {' or '.join(NAMES)}; give a checkpoint"
    )


def find_data(checkpoint, options, data=None):
    """The folder with a checkpoint's dictionary and SentencePiece model.

    Args:
        options: of the training's task.
        data: the folder, if the user names it.

    Raises:
        OptionError: there is none.
    """
    from fairseq import utils

    beside = [checkpoint.parent, checkpoint.parent.parent]
    trained = Path(utils.split_paths(options.data)[0])
    candidates = [Path(data)] if data is not None else [trained, *beside]
    for folder in candidates:
        if (folder / SPM_FILE).is_file():
            return folder
    given = f"data {data}" if data is not None else f"{checkpoint}: its data folder {trained}"
    raise OptionError(f"{given}: has no {SPM_FILE}; give the output of prepare as data")
