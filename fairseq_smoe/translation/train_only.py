"""Training some of a model's parameters, or some of their rows (``--train-only``)."""

import re
from functools import partial

import torch

from fairseq_smoe.errors import OptionError

_WORD = re.compile(r"(?P<name>[\w.]+)(\[(?P<start>\d+):\])?")


def parse_train_only(text):
    """``"gates,embed_tokens[2000:]"`` -> ``{"gates": 0, "embed_tokens": 2000}``

    Raises:
        OptionError: a word is none.
    """
    found = {}
    for word in text.split(","):
        match = _WORD.fullmatch(word.strip())
        if match is None:
            raise OptionError(
                f"--train-only {word}: expected a part of a parameter's name, such as gates, or "
                "embed_tokens[2000:] for its rows from 2000 on"
            )
        found[match["name"]] = int(match["start"] or 0)
    return found


def trains_rows(text):
    """Whether only some rows of a parameter are to be trained."""
    return any(parse_train_only(text).values())


def train_only(model, text):
    """Freeze all other parameters of a model.

    A parameter is trained if a word of ``text`` is a part of its name. ``[N:]`` behind the word:
    only its rows from N on, in its first dimension (tokens of embeddings, experts of stacked
    weights). The gradient of the others is zero, so that an optimizer without weight decay leaves
    them as they are.

    Raises:
        OptionError: a word is in no name, or a parameter has no such row.
    """
    starts = parse_train_only(text)
    unused = set(starts)
    for name, parameter in model.named_parameters():
        words = [word for word in starts if word in name]
        unused -= set(words)
        if not words:
            parameter.requires_grad_(False)
            continue
        start = min(starts[word] for word in words)
        if start >= len(parameter):
            raise OptionError(
                f"--train-only {words[0]}[{start}:]: {name} has {len(parameter)} rows; give fewer"
            )
        if start and parameter.requires_grad:
            parameter.register_hook(partial(_from_row, start))
    if unused:
        raise OptionError(
            f"--train-only {sorted(unused)[0]}: is in no parameter's name; there are gates, "
            "experts, norms, embed_tokens, self_attn, encoder_attn, fc1, fc2, encoder, decoder, "
            "and layers.0, ..."
        )


def _from_row(start, gradient):
    return torch.cat([torch.zeros_like(gradient[:start]), gradient[start:]])
