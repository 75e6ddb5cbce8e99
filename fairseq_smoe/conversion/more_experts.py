"""A mixture with more experts: copies of those that are there, closed until a training goes on."""

import torch

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.doors import chosen_arrangements
from fairseq_smoe.moe.strata import format_strata
from fairseq_smoe.translation.options import resolve_strata
from fairseq_smoe.translation.untrained_experts import (
    format_untrained_experts,
    parse_untrained_experts,
)

GATES = ("top-k", "threshold")
STACKED = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def add_experts(source, numbers, noise=0.01, seed=1):
    """Add experts at the end of strata. Each begins as a copy of one of its stratum, in turn, and
    so do its rows in the gates. The model translates as before, as the new experts are marked as
    untrained: no gate chooses them until a training goes on.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; it is changed.
        numbers: ``{stratum, from 1: experts to add}``
        noise: standard deviation of what is added to the numbers of every new expert, relative to
            their root mean square in the tensor; without it, copies would stay equal.
        seed: of the noise.

    Returns:
        The strata afterwards.

    Raises:
        OptionError: the model has no such stratum, or other gates or experts.
    """
    strata = _check(source, numbers)
    torch.manual_seed(seed)
    added = [numbers.get(stratum, 0) for stratum in range(1, len(strata) + 1)]
    for block in source.blocks():
        for part in STACKED:
            name = f"{block.name}.experts.{part}"
            source.parameters[name] = _grown(source.take(name), strata, added, noise)
        for i in range(len(strata)):
            for part in ("weight", "logit_bias"):
                name = f"{block.name}.gates.{i}.{part}"
                if name in source.parameters:
                    rows_ED = source.take(name)
                    source.parameters[name] = _grown(rows_ED, strata[i:], added[i:], 0)
    after = tuple(size + more for size, more in zip(strata, added))
    closed = parse_untrained_experts(source.options.untrained_experts or "")
    for stratum, more in numbers.items():
        closed[stratum] = closed.get(stratum, 0) + more
    source.set_options(
        smoe_strata=format_strata(after),
        moe_expert_count=None,
        untrained_experts=format_untrained_experts(closed),
    )
    return after


def _check(source, numbers):
    """The strata of a model that can get more experts."""
    source.require_experts("--add-experts")
    options = source.options
    for flag, value, known in (
        ("--moe-experts", options.moe_experts, ("ffn",)),
        ("--moe-gate", options.moe_gate, GATES),
        ("--moe-ffn-split", options.moe_ffn_split, (1,)),
    ):
        if value not in known:
            raise OptionError(
                f"--add-experts: {source.path} was trained with {flag} {value}; it is for "
                f"{' or '.join(map(str, known))}"
            )
    others = [kind.name for kind in chosen_arrangements(options) if kind.name != "cmr"]
    if others:
        raise OptionError(
            f"--add-experts: {source.path} has blocks in the arrangement {others[0]}; it is for "
            "strata, with or without --moe-cmr"
        )
    strata = resolve_strata(options)
    for stratum in numbers:
        if stratum > len(strata):
            raise OptionError(
                f"--add-experts {stratum}:{numbers[stratum]}: {source.path} has the strata "
                f"{format_strata(strata)}; give a stratum from 1 to {len(strata)}"
            )
    return strata


def _grown(rows_E, strata, added, noise):
    """Rows of all experts with copies at the ends of strata."""
    parts = []
    for own, more in zip(rows_E.split(list(strata)), added):
        copies = own[torch.arange(more) % len(own)]
        if noise:
            spread = noise * own.float().square().mean().sqrt()
            copies = copies + (spread * torch.randn(copies.shape)).to(copies.dtype)
        parts += [own, copies]
    return torch.cat(parts)
