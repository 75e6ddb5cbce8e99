"""Experts that have been added to a model, and that no gate chooses before they are trained."""

import re

import torch

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.layers import expert_layers

_WORD = re.compile(r"([1-9]\d*):([1-9]\d*)")


def parse_untrained_experts(text, flag="--untrained-experts"):
    """``"2:4,3:1"`` -> ``{2: 4, 3: 1}``, the number of experts at the end of each stratum.

    Raises:
        OptionError: it has another form.
    """
    found = {}
    for word in text.split(",") if text else ():
        match = _WORD.fullmatch(word.strip())
        if match is None or int(match[1]) in found:
            raise OptionError(
                f"{flag} {text}: expected STRATUM:NUMBER,..., such as 2:4 for four experts of the "
                "second stratum"
            )
        found[int(match[1])] = int(match[2])
    return found


def format_untrained_experts(numbers):
    return ",".join(f"{stratum}:{number}" for stratum, number in sorted(numbers.items()))


def close_experts(model, text):
    """Let no gate of a model choose the last experts of strata.

    Args:
        text: see :func:`parse_untrained_experts`.

    Raises:
        OptionError: a stratum has no other experts.
    """
    numbers = parse_untrained_experts(text)
    for _, layer in expert_layers(model):
        block = layer.routed_block
        closed_E = torch.cat(
            [
                torch.arange(size) >= size - numbers.get(stratum, 0)
                for stratum, size in enumerate(block.strata, 1)
            ]
        )
        if max(numbers) > len(block.strata) or closed_E.split(block.strata)[-1].all():
            raise OptionError(
                f"--untrained-experts {text}: the model has the strata {block.strata}, of which "
                "experts have to be left"
            )
        for gate, visible in zip(block.gates, block.visible):
            gate.close(closed_E[visible.start : visible.stop])
