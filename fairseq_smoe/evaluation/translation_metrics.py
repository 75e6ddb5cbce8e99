"""The metrics, each as a corpus score and as a function of counts per sentence.

A metric's ``statistics`` are integers per sentence whose sums determine the corpus score. This
makes it cheap to resample sentences (``significance.py``). ``tolerance`` is the largest expected
difference between the score of the sums and the corpus score, on a scale of 100.
"""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_base import BaseTokenizer
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from fairseq_smoe.errors import OptionError

UNKNOWN = "<unk>"  # fairseq's text for a piece that is not in the dictionary
_END = "</s>"
_MAX_ORDER = 4


class PieceBleu:
    """BLEU over SentencePiece pieces, as fairseq-generate prints it without --post-process ("BLEU4
    = ..."). The scripts of the paper's authors read that line.

    An unknown piece of a reference matches nothing. If the target starts with a token of the target
    language, hypotheses and references both begin with it. fairseq counts it as a piece that is
    always right, and so does this metric.

    Args:
        language_token: whether the model was trained with that token, as the authors' are.
    """

    suffix = "pieces"
    # fairseq compares hashes of n-grams; a few are equal by chance, which gives too many matches
    tolerance = 0.05

    def __init__(self, language_token=True):
        self._first = ["<target language>"] if language_token else []
        self.signature = (
            f"fairseq:BLEU4|tok:sentencepiece|langtok:{'yes' if language_token else 'no'}"
            "|smooth:none"
        )

    def corpus_score(self, hypotheses, references):
        """0 to 100, by fairseq's own scorer."""
        import torch
        from fairseq.scoring.bleu import BleuConfig, Scorer

        scorer = Scorer(BleuConfig())
        numbers = {UNKNOWN: scorer.unk}

        def number(line):
            pieces = self._split(line)
            first_free = scorer.unk + 1  # lower ids are fairseq's special symbols
            found = [numbers.setdefault(piece, first_free + len(numbers)) for piece in pieces]
            return torch.IntTensor([*found, scorer.eos])  # as fairseq's own; trimmed by the scorer

        for hypothesis, reference in zip(hypotheses, references, strict=True):
            scorer.add(number(reference), number(hypothesis))
        return scorer.score()

    def statistics(self, hypotheses, references):
        """(sentences, 10) int64: lengths of hypothesis and reference, matches and n-grams of the
        hypothesis of orders 1 to 4."""
        rows = []
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            # of an empty sentence, fairseq counts the end-of-sentence token
            ours = self._split(hypothesis) or [_END]
            # None is not a piece
            right = [None if p == UNKNOWN else p for p in self._split(reference) or [_END]]
            found, total = [], []
            for order in range(1, _MAX_ORDER + 1):
                ngrams = Counter(zip(*(ours[i:] for i in range(order))))
                known = Counter(
                    ngram for ngram in zip(*(right[i:] for i in range(order))) if None not in ngram
                )
                found.append((ngrams & known).total())
                total.append(ngrams.total())
            rows.append([len(ours), len(right), *found, *total])
        return np.array(rows, dtype=np.int64)

    def score_sums(self, sums):
        """Corpus scores of summed statistics: (..., 10) -> (...)."""
        return _bleu_of(sums, smooth=False)

    def _split(self, line):
        return self._first + [piece for piece in line.split(" ") if piece]


class SacreBleu:
    """A metric of sacrebleu with one reference.

    Args:
        metric: ``sacrebleu.metrics.BLEU`` with exponential smoothing, or ``CHRF``.
        note: added to the signature.
    """

    suffix = "txt"
    tolerance = 0.005

    def __init__(self, metric, **note):
        self._metric = metric
        self._note = note

    @property
    def signature(self):
        """sacrebleu's; known only when something has been scored."""
        signature = self._metric.get_signature()
        for key, value in self._note.items():
            signature.update(key, value)
        return str(signature)

    def corpus_score(self, hypotheses, references):
        """0 to 100, by sacrebleu."""
        return self._metric.corpus_score(hypotheses, [references]).score

    def statistics(self, hypotheses, references):
        """(sentences, counts) int64, as sacrebleu's own significance tests use them."""
        rows = self._metric._extract_corpus_statistics(hypotheses, [references])
        return np.array(rows, dtype=np.int64)

    def score_sums(self, sums):
        """Corpus scores of summed statistics: (..., counts) -> (...)."""
        if isinstance(self._metric, BLEU):
            return _bleu_of(sums, smooth=True)
        return _chrf_of(sums, self._metric.beta)


def bleu():
    return SacreBleu(BLEU())


def chrf_plus_plus():
    return SacreBleu(CHRF(word_order=2))


def spbleu(model_file=None):
    """BLEU over the pieces of the Flores-200 SentencePiece model.

    Args:
        model_file: that model; without it, the one in sacrebleu's cache.

    Raises:
        OptionError: there is none, or it is no SentencePiece model.
    """
    if model_file is None:
        cached = cached_flores200_model()
        if not has_flores200_model():
            raise OptionError(
                "--metrics spbleu: sacrebleu's Flores-200 tokenizer is missing; download "
                f"{SPM_MODELS['flores200']['url']} and save it as {cached}, or give its file "
                "with --flores200-spm"
            )
        _load_sentencepiece(cached, f"{cached}")
        return SacreBleu(BLEU(tokenize="flores200"))
    tokenizer = _SentencePieceTokenizer(
        _load_sentencepiece(model_file, f"--flores200-spm {model_file}")
    )
    metric = BLEU(tokenize="none")
    metric.tokenizer = tokenizer
    metric.tokenizer_signature = tokenizer.signature()
    # it may be another model than that of Flores-200, so the signature tells which it is
    digest = hashlib.sha256(Path(model_file).read_bytes()).hexdigest()
    return SacreBleu(metric, spm=digest[:8])


def cached_flores200_model():
    """Where sacrebleu keeps the model."""
    return Path(SACREBLEU_DIR) / "models" / Path(SPM_MODELS["flores200"]["url"]).name


def has_flores200_model():
    """Whether sacrebleu can score without a download."""
    path = cached_flores200_model()
    return path.is_file() and path.stat().st_size > 0


class _SentencePieceTokenizer(BaseTokenizer):
    def __init__(self, processor):
        self._processor = processor

    def signature(self):
        return SPM_MODELS["flores200"]["signature"]

    def __call__(self, line):
        return " ".join(self._processor.encode(line, out_type=str))


def _load_sentencepiece(path, named):
    from sentencepiece import SentencePieceProcessor

    if not Path(path).is_file():
        raise OptionError(f"{named}: no such file; give the SentencePiece model of Flores-200")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise OptionError(
            f"{named}: is no SentencePiece model; give that of Flores-200, "
            f"{SPM_MODELS['flores200']['url']}"
        ) from error


def _bleu_of(sums, smooth):
    """BLEU with orders 1 to 4, 0 to 100.

    Args:
        sums: (..., 10), see :meth:`PieceBleu.statistics`.
        smooth: count the first order without a match as half a match, the next such order as a
            quarter, and so on (sacrebleu's "exp").
    """
    sums = np.asarray(sums, dtype=np.float64)
    ours, reference = sums[..., 0], sums[..., 1]
    found, total = sums[..., 2:6], sums[..., 6:10]
    matches = found
    if smooth:
        none = found == 0
        matches = np.where(none, 0.5 ** np.cumsum(none, axis=-1), found)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(total > 0, matches / total, 0)
        brevity = np.where(ours > 0, np.exp(np.minimum(0, 1 - reference / ours)), 0)
        scores = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.where(found.any(axis=-1), scores, 0)


def _chrf_of(sums, beta):
    """chrF, 0 to 100: F of the mean precision and the mean recall over the orders that occur.

    Args:
        sums: (..., 3 * orders): n-grams of hypothesis and reference, and matches, per order.
    """
    sums = np.asarray(sums, dtype=np.float64)
    ours, reference, found = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    occurs = (ours > 0) & (reference > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(occurs, found / ours, 0).sum(-1) / occurs.sum(-1)
        recall = np.where(occurs, found / reference, 0).sum(-1) / occurs.sum(-1)
        scores = 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)
    return np.nan_to_num(scores)
