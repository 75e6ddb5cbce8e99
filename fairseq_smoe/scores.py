"""BLEU and chrF of what ``fairseq-generate`` printed. Needs no fairseq."""

import re
from dataclasses import dataclass
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF

from fairseq_smoe.errors import OptionError

# T-12<tab>reference and D-12<tab>log probability<tab>translation, both without sentence pieces
_REFERENCE = re.compile(r"T-(?P<index>\d+)\t(?P<text>.*)")
_TRANSLATION = re.compile(r"D-(?P<index>\d+)\t[^\t]*\t(?P<text>.*)")


@dataclass(frozen=True)
class Scores:
    """Corpus scores of one translation direction, 0 to 100, with sacrebleu's signatures."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def read_generation(path):
    """Best translation and reference of every sentence, in the order of the test set.

    Raises:
        OptionError: the file is missing, or is no complete output of ``fairseq-generate``.
    """
    if not Path(path).exists():
        raise OptionError(f"{path}: no such file; write the output of fairseq-generate to it")
    translations, references = {}, {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            for pattern, texts in ((_TRANSLATION, translations), (_REFERENCE, references)):
                if match := pattern.fullmatch(line.rstrip("\n")):
                    # with --nbest the best one comes first
                    texts.setdefault(int(match["index"]), match["text"])
    if not references or translations.keys() != references.keys():
        raise OptionError(
            f"{path}: {len(translations)} translations (D-) and {len(references)} references (T-); "
            "expected as many of both: run fairseq-generate again, without --quiet"
        )
    order = range(len(references))
    if missing := sorted(set(order) - references.keys()):
        raise OptionError(
            f"{path}: sentence {missing[0]} (from 0) was not translated: run fairseq-generate "
            "again, without --skip-invalid-size-inputs-valid-test"
        )
    return [translations[i] for i in order], [references[i] for i in order]


def score(translations, references):
    """Corpus BLEU (13a, no effective order) and chrF (chrF2) by sacrebleu's defaults."""
    bleu, chrf = BLEU(), CHRF()
    return Scores(
        bleu=bleu.corpus_score(translations, [references]).score,
        chrf=chrf.corpus_score(translations, [references]).score,
        bleu_signature=str(bleu.get_signature()),
        chrf_signature=str(chrf.get_signature()),
    )
