"""Sentences without words: their translation is empty, and a model does not see them."""

import torch
from fairseq import utils


def translate_sentences(translate, batch, has_words_B, eos, size):
    """Translate those sentences of a batch that have words.

    Args:
        translate: makes a list with the hypotheses of every sentence from a batch.
        batch: a dict, or several in a dict, of tensors whose first dimension is the batch, and
            other things.
        has_words_B: (B,) bool
        eos: index of the end of a sentence.
        size: hypotheses of a sentence.

    Returns:
        a list of B lists of hypotheses, as fairseq's generators make them.
    """
    if has_words_B.all():
        return translate(batch)
    num_sentences = len(has_words_B)
    rows = has_words_B.nonzero().squeeze(1)

    def take(tensor):
        if tensor.dim() == 0 or len(tensor) != num_sentences:
            return tensor
        return tensor[rows.to(tensor.device)]

    found = iter(translate(utils.apply_to_sample(take, batch)) if len(rows) else ())
    return [
        next(found) if has_words else [_empty(eos, has_words_B.device) for _ in range(size)]
        for has_words in has_words_B.tolist()
    ]


def _empty(eos, device):
    """A hypothesis without words: log probability 0."""
    return {
        "tokens": torch.tensor([eos], device=device),
        "score": torch.tensor(0.0, device=device),
        "attention": torch.empty(0),
        "alignment": [],
        "positional_scores": torch.zeros(1, device=device),
    }
