"""From a trained model to a folder for another runtime."""

from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.export import ctranslate2_folder, transformers_folder
from fairseq_smoe.files import require_new_folder, whole_folder, write_whole
from fairseq_smoe.translation.task_files import sentencepiece_file

FORMATS = ("transformers", "ctranslate2")
CARD = "README.md"


def export(checkpoint, target, file_format, make_card, data=None, quantization=None):
    """Write a folder for another runtime.

    Args:
        checkpoint: packed model, checkpoint or folder of a training.
        target: folder to make. It is complete or absent.
        file_format: one of :data:`FORMATS`.
        make_card: ``make_card(described, model, use, library)`` returns the text of the README;
            ``use`` is that about translating.
        data: see :func:`~fairseq_smoe.inference.sources.find_data`.
        quantization: of CTranslate2.

    Raises:
        OptionError: the folder exists, or the runtime cannot compute what this model does.
    """
    if file_format not in FORMATS:
        raise OptionError(f"--format {file_format}: expected {' or '.join(FORMATS)}")
    if quantization is not None and file_format != "ctranslate2":
        raise OptionError(
            f"--quantization {quantization}: is for --format ctranslate2; leave it out"
        )
    ctranslate2_folder.check_quantization(quantization)
    if file_format == "ctranslate2":
        ctranslate2_folder.require_library()
    require_new_folder(target)
    from fairseq_smoe.export.language_start import LanguageStart
    from fairseq_smoe.inference.loading import load_model
    from fairseq_smoe.inference.packed import joint_dictionary

    loaded = load_model(Path(checkpoint), data)
    (model,), described = loaded.models, loaded.described
    _check_extended(loaded, checkpoint)
    dictionary = joint_dictionary(loaded.task, checkpoint)
    start = LanguageStart.of(loaded.task, dictionary)
    parts = model, described.options, dictionary
    with whole_folder(target) as folder:
        if file_format == "ctranslate2":
            ctranslate2_folder.write(folder, *parts, loaded.spm, quantization)
            use = ctranslate2_folder.use(start)
        else:
            transformers_folder.write(folder, *parts, start, loaded.spm)
            use = transformers_folder.use((folder / "modeling_smoe.py").exists())
        write_whole(folder / CARD, make_card(described, model, use, file_format))


def _check_extended(loaded, checkpoint):
    """Raises:
    OptionError: the model was extended, by what exported models do not have.
    """
    options = loaded.described.options
    if getattr(options, "untrained_tokens", 0) or getattr(options, "untrained_experts", None):
        raise OptionError(
            f"{checkpoint}: was extended, and what is new has not been trained; train it first"
        )
    for language in loaded.task.langs:
        if sentencepiece_file(loaded.spm.parent, language) != loaded.spm:
            raise OptionError(
                f"{checkpoint}: {language} has a SentencePiece model of its own, and exported "
                "models have one for all; use 'pack'"
            )
