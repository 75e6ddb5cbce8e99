"""Names of the files that data preparation writes and the task reads."""

from pathlib import Path

LANGS_FILE = "langs.txt"  # one language per line, in the order of their tokens in the vocabulary
SPM_FILE = "spm.model"  # the SentencePiece model of all languages without one of their own


def sentencepiece_file(folder, language):
    """The SentencePiece model of a language: ``spm.LANGUAGE.model`` if the language was added to a
    vocabulary that had been there before."""
    own = Path(folder) / f"spm.{language}.model"
    return own if own.is_file() else Path(folder) / SPM_FILE
