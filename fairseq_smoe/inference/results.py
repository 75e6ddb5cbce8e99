"""What a :class:`~fairseq_smoe.inference.translator.Translator` returns."""

from dataclasses import dataclass

SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class Hypothesis:
    """A translation of a text.

    Attributes:
        text: plain text.
        score: mean log2-probability of its tokens, with the target language's token and the end of
            the sentence, divided as --lenpen says; the number that fairseq-generate prints. None
            unless scores were asked for.
        pieces: SentencePiece pieces.
        piece_scores: log2-probability of each piece, and last of the end of the sentence; None
            unless scores were asked for.
    """

    text: str
    score: float | None
    pieces: tuple
    piece_scores: tuple | None


@dataclass(frozen=True)
class TokenCapacity:
    """How much of the model a token takes.

    Attributes:
        piece: the token as text: a SentencePiece piece, a language token ``__de__`` or ``</s>``.
        passes: passes in each expert layer, in their order.
        experts: for each expert layer, for each pass the numbers of the experts that the token
            visits, from 0 in the order of the strata.
    """

    piece: str
    passes: tuple
    experts: tuple

    @property
    def mean_passes(self):
        return sum(self.passes) / len(self.passes)


@dataclass(frozen=True)
class Capacity:
    """Passes of all tokens of a sentence and of its translation.

    Attributes:
        source, target: lists of :class:`TokenCapacity`, in the encoder's and the decoder's order.
            A decoder takes passes for its *inputs*; each is named by the token that it predicts.
        layers: ``{"encoder": names, "decoder": names}`` of the expert layers, such as ``layer 2``.
    """

    source: tuple
    target: tuple
    layers: dict

    @staticmethod
    def mean(tokens):
        """Mean passes of some :class:`TokenCapacity`; None of none."""
        return sum(token.mean_passes for token in tokens) / len(tokens) if tokens else None


@dataclass(frozen=True)
class Translated:
    """A translated text.

    Attributes:
        text: the best translation.
        hypotheses: the best ``n_best`` ones, best first.
        source_lang, target_lang: the direction.
        capacity: tuple of :class:`Capacity`, one for each part into which the text was split; None
            unless asked for, and for a model without experts.
    """

    text: str
    hypotheses: tuple
    source_lang: str
    target_lang: str
    capacity: tuple | None = None
