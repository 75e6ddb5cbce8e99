"""Text to the tokens of a model and back."""

from functools import lru_cache
from pathlib import Path

import sentencepiece

from fairseq_smoe.evaluation.test_set import to_text
from fairseq_smoe.translation.task_files import sentencepiece_file


class TextCoder:
    """Encodes and decodes with SentencePiece and the model's dictionary.

    Args:
        spm: path of the SentencePiece model; languages that were added later have one beside it.
        dictionary: the model's, a fairseq ``Dictionary``.
    """

    def __init__(self, spm, dictionary):
        self._folder = Path(spm).parent
        self._dictionary = dictionary
        self._processor = lru_cache(maxsize=None)(self._load)
        self._processor(Path(spm))  # says now if it is damaged

    @staticmethod
    def _load(path):
        return sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(self, text, language):
        """(S,) int64: the text's pieces and the end of the sentence."""
        processor = self._processor(sentencepiece_file(self._folder, language))
        # by ids: what this language's model does not know, another language may
        pieces = " ".join(map(processor.id_to_piece, processor.encode(text)))
        return self._dictionary.encode_line(pieces, append_eos=True, add_if_not_exist=False).long()

    def pieces(self, tokens, hidden=()):
        """The pieces of (T,) tokens, without the end of the sentence and those in ``hidden``."""
        shown = [t for t in tokens.tolist() if t != self._dictionary.eos() and t not in hidden]
        return [self._dictionary[token] for token in shown]

    def symbol(self, token):
        """The text of one token, special ones too."""
        return self._dictionary[int(token)]

    @staticmethod
    def text(pieces):
        return to_text(" ".join(pieces))
