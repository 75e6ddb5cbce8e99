"""From a path that a user gives to models that translate."""

from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation import set_up_fairseq
from fairseq_smoe.inference.sources import Described, Loaded, read_checkpoint
from fairseq_smoe.translation.task_files import SPM_FILE

DTYPES = ("float32", "bfloat16", "float16", "int8")


def add_loading_options(parser):
    """Add the arguments that say which model to load, and where to."""
    parser.add_argument(
        "model",
        nargs="+",
        type=Path,
        help="packed model, checkpoint or folder of a training; several translate together",
    )
    group = parser.add_argument_group("loading the model")
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="output of prepare (default: that of the training)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument(
        "--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: %(default)s)"
    )


def load_models(paths, device, data=None, dtype="float32"):
    """Load one model, or several that translate together, onto a device.

    Args:
        paths: one or a list; see :meth:`~fairseq_smoe.inference.translator.Translator.load`.
        device: a ``torch.device``.

    Returns:
        :class:`~fairseq_smoe.inference.sources.Loaded`

    Raises:
        OptionError: a file is missing, or the models have different vocabularies or languages.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype}: expected {' or '.join(DTYPES)}")
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise OptionError("no model: give a packed model, a checkpoint or the folder of a training")
    loaded = [load_model(path, data) for path in paths]
    first = loaded[0]
    for path, other in zip(paths[1:], loaded[1:]):
        ours, theirs = (each.task.source_dictionary for each in (first, other))
        if ours.symbols != theirs.symbols or first.task.langs != other.task.langs:
            raise OptionError(
                f"{path}: has another vocabulary or other languages than {paths[0]}; models that "
                "translate together need the same"
            )
    models = [model for each in loaded for model in each.models]
    if dtype == "int8":
        from fairseq_smoe.evaluation.int8 import quantise

        for model in models:
            quantise(model)
    elif dtype != "float32":
        import torch

        models = [model.to(getattr(torch, dtype)) for model in models]
    else:
        from fairseq_smoe.evaluation.reordered import can_reorder, reorder

        for model in models if can_reorder(device) else ():
            reorder(model)
    models = [model.to(device) for model in models]
    return Loaded(models, first.task, first.spm, first.directions, first.described)


def load_model(path, data=None):
    """Load one model as it was trained: in float32, on the CPU, in evaluation mode.

    Args:
        path: see :meth:`~fairseq_smoe.inference.translator.Translator.load`.
        data: see :func:`~fairseq_smoe.inference.sources.find_data`.

    Returns:
        :class:`~fairseq_smoe.inference.sources.Loaded`

    Raises:
        OptionError: a file is missing.
    """
    set_up_fairseq()
    from fairseq_smoe.inference import packed

    path = Path(path)
    if packed.is_packed(path):
        if data is not None:
            raise OptionError(
                f"data {data}: {path} is a packed model, which needs none; leave it out"
            )
        return packed.load(path)
    saved, folder = read_checkpoint(path, data)
    described = Described.of(saved)
    model, task = saved.build(described.directions)
    directions = [tuple(direction.split("-")) for direction in described.directions]
    return Loaded([model], task, folder / SPM_FILE, directions, described)
