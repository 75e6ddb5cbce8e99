"""The strata of a checkpoint, derived from the shapes of its gates."""

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


def live_experts(state_dict):
    """``(alive, all)``: experts of all blocks, if gates let them come and go; else None."""
    alive = total = 0
    for block, sizes in gate_sizes(state_dict).items():
        stacked = len(sizes) > 1 and any(a <= b for a, b in zip(sizes, sizes[1:]))
        for i in range(len(sizes) if stacked else 1):  # in strata the first gate sees all experts
            alive_E = state_dict.get(f"{block}.gates.{i}.alive_E")
            if alive_E is None:
                return None
            alive, total = alive + int(alive_E.sum()), total + len(alive_E)
    return (alive, total) if total else None


def describe_gates(sizes):
    """The layout in words. In strata each gate sees fewer experts than the one before; in a stack
    each gate sees its own experts only."""
    if not sizes:
        return "no experts"
    if len(sizes) > 1 and any(a <= b for a, b in zip(sizes, sizes[1:])):
        return f"stacked MoE layers {format_strata(sizes)}"
    strata = [a - b for a, b in zip(sizes, (*sizes[1:], 0))]
    return f"strata {format_strata(strata)}"
