"""Text to the tokens of a model and back."""

import sentencepiece

from fairseq_smoe.evaluation.test_set import to_text


class TextCoder:
    """Encodes and decodes with SentencePiece and the model's dictionary.

    Args:
        spm: path of the SentencePiece model.
        dictionary: the model's, a fairseq ``Dictionary``.
    """

    def __init__(self, spm, dictionary):
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        self._dictionary = dictionary

    def encode(self, text):
        """(S,) int64: the text's pieces and the end of the sentence."""
        pieces = " ".join(self._processor.encode(text, out_type=str))
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
