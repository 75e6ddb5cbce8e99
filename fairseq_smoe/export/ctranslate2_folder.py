"""A folder that ``ctranslate2.Translator`` reads."""

import shutil

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.task_files import SPM_FILE

QUANTIZATIONS = (
    *("int8", "int8_float32", "int8_float16", "int8_bfloat16"),
    *("int16", "float16", "bfloat16", "float32"),
)
MOST_WORDS = 200  # of a translation, as in fairseq-generate
USE = """\
    import ctranslate2
    import sentencepiece

    translator = ctranslate2.Translator("PATH OF THIS FOLDER")
    spm = sentencepiece.SentencePieceProcessor(model_file="PATH OF THIS FOLDER/spm.model")
    sources = [{pieces} for text in ["..."]]
    found = translator.translate_batch(
        sources, {prefix}beam_size=5, max_decoding_length={longest}
    )
    for each in found:
        print("".join({words}).replace("▁", " ").strip())
"""


def require_library():
    """Raises:
    OptionError: CTranslate2 is not installed.
    """
    try:
        import ctranslate2.converters  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "--format ctranslate2: needs the package ctranslate2; install it with "
            "pip install 'fairseq-smoe[ctranslate2]'"
        ) from error


def check_quantization(quantization):
    """Raises:
    OptionError: CTranslate2 has no such weights.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise OptionError(f"--quantization {quantization}: expected {', '.join(QUANTIZATIONS)}")


def write(folder, model, options, dictionary, spm, quantization=None):
    """Write all files but the README.

    Args:
        folder: to write into.
        model, options, dictionary: see :func:`~fairseq_smoe.export.ctranslate2.specification`.
        spm: path of the SentencePiece model.
        quantization: one of :data:`QUANTIZATIONS`; None for float32.

    Raises:
        OptionError: CTranslate2 cannot compute what this model does.
    """
    from fairseq_smoe.export.ctranslate2 import specification

    spec = specification(model, options, dictionary)
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    shutil.copyfile(spm, folder / SPM_FILE)


def use(start):
    """The text of the README about translating.

    Args:
        start: :class:`~fairseq_smoe.export.language_start.LanguageStart`
    """
    language, token = next(iter(start.tokens.items()))
    of_source, of_target = (
        token.replace(language, f"{{{side}}}", 1) for side in ("source", "target")
    )
    first = {None: None, "src": of_source, "tgt": of_target}[start.source]
    pieces = "spm.encode(text, out_type=str)"
    return USE.format(
        pieces=pieces if first is None else f'["{first}", *{pieces}]',
        prefix=f'target_prefix=[["{of_target}"]] * len(sources), ' if start.target else "",
        longest=MOST_WORDS + int(start.target),
        words="each.hypotheses[0][1:]" if start.target else "each.hypotheses[0]",
    )
