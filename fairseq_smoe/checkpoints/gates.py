"""Which strata a checkpoint has, by the shapes of its gates."""

import re

from fairseq_smoe.moe.strata import format_strata

_GATE = re.compile(r"^(?P<block>.*expert_block(?:\.block)*)\.gates\.(?P<index>\d+)\.weight$")


def gate_sizes(state_dict):
    """Experts that each gate sees, per block: ``{block name: (E_1, ..., E_L)}``."""
    sizes = {}
    for name, tensor in state_dict.items():
        match = _GATE.match(name)
        if match:
            sizes.setdefault(match["block"], {})[int(match["index"])] = tensor.shape[0]
    return {block: tuple(gates[i] for i in sorted(gates)) for block, gates in sizes.items()}


def describe_gates(sizes):
    """Layout in words: gates of one block see ever fewer experts in strata, their own in a stack."""
    if not sizes:
        return "no experts"
    if len(sizes) > 1 and any(a <= b for a, b in zip(sizes, sizes[1:])):
        return f"stacked MoE layers {format_strata(sizes)}"
    strata = [a - b for a, b in zip(sizes, (*sizes[1:], 0))]
    return f"strata {format_strata(strata)}"
