"""A vocabulary that is there already, to which languages are added.

What is there keeps its ids, and its languages keep their SentencePiece model, so that a trained
model translates them as before. A new language has a model of its own (``spm.LANGUAGE.model``).
Those of its pieces that the vocabulary lacks come behind all that is there, and the language's token
behind them. So the order in which languages are added is that of their tokens.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import whole_file
from fairseq_smoe.preparation.vocabulary import language_token, model_pieces, read_dictionary
from fairseq_smoe.translation.task_files import LANGS_FILE, SPM_FILE


@dataclass(frozen=True)
class Base:
    """The vocabulary of a folder that ``prepare`` has made.

    Attributes:
        folder: its path.
        symbols: of the dictionary, without fairseq's special ones.
        languages: in the order in which fairseq is given them.
    """

    folder: Path
    symbols: list
    languages: list

    def new_languages(self, langs):
        """Those of ``langs`` that are not there yet, in their order."""
        return [lang for lang in langs if lang not in self.languages]


def read_base(folder):
    """The :class:`Base` of a folder.

    Raises:
        OptionError: a file is missing, or the dictionary does not have the tokens of languages.
    """
    from fairseq_smoe.translation.languages import read_languages  # brings fairseq: seconds

    folder = Path(folder)
    for name in ("dict.txt", SPM_FILE, LANGS_FILE):
        if not (folder / name).is_file():
            raise OptionError(
                f"--vocabulary-of {folder}: has no {name}; give a folder that prepare has made"
            )
    base = Base(folder, read_dictionary(folder / "dict.txt"), read_languages(folder / LANGS_FILE))
    for lang in base.languages:
        if language_token(lang) not in base.symbols:
            raise OptionError(
                f"--vocabulary-of {folder}: its dict.txt has no token of {lang}; give a folder "
                "that prepare has made"
            )
    return base


def extend(base, langs, target):
    """Take over the SentencePiece models of a vocabulary.

    Args:
        base: :class:`Base`
        langs: of the text; the models of those that are new are in ``target``, unless they get no
            pieces of their own.
        target: folder of the new vocabulary.

    Returns:
        the symbols of its dictionary.
    """
    for path in base.folder.glob("spm*.model"):
        with whole_file(target / path.name) as copy, open(path, "rb") as original:
            shutil.copyfileobj(original, copy)
    symbols, known = list(base.symbols), set(base.symbols)
    for lang in base.new_languages(langs):
        own, pieces = target / f"spm.{lang}.model", []
        if own.exists():
            pieces = model_pieces(spm.SentencePieceProcessor(model_file=str(own)))
        new = [piece for piece in pieces if piece not in known] + [language_token(lang)]
        symbols += new
        known.update(new)
    return symbols
