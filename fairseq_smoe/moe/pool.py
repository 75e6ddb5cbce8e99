"""Experts that come and go: the rules by which the live experts of a block change (DynMoE).

A block has a fixed pool of experts, of which some are alive. All gates of a block agree on which.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from fairseq_smoe.moe.strata import own_experts


@dataclass(frozen=True)
class NewRow:
    """A row of a parameter that begins anew: an optimizer has to forget what it keeps of it.

    Attributes:
        parameter: of the block, or an expert's that this process holds.
        row: index into its first dimension.
        value: the new value; None if the value stays.
    """

    parameter: nn.Parameter
    row: int
    value: Optional[torch.Tensor] = None


def decide(alive, strata, visits, unserved):
    """Which experts go and which come.

    An expert that no token has visited, at any gate, goes. A stratum where tokens have visited no
    expert gets one of the places that are free already; an expert that goes now does not come back
    at the same time. If a stratum would be left without experts, its first one stays.

    Args:
        alive: for each expert of the pool, whether it is alive.
        strata: sizes of the strata of the pool.
        visits: for each expert the number of visits, at all gates.
        unserved: for each stratum, whether tokens at its gate have visited no expert.

    Returns:
        ``(gone, new)``: list of experts, and ``{stratum: expert}``.
    """
    gone, new = [], {}
    for stratum, own in enumerate(own_experts(strata)):
        free = [e for e in own if not alive[e]]
        unused = [e for e in own if alive[e] and not visits[e]]
        if unserved[stratum] and free:
            new[stratum] = free[0]
        elif len(unused) + len(free) == len(own):
            unused = unused[1:]
        gone += unused
    return gone, new


@torch.no_grad()
def change_experts(block):
    """Let experts of a block come and go by what its gates have counted, and reset the counts.

    A new expert gets the same vector in all gates that see it, the normalised sum of the tokens
    that visited no expert at the gate of its stratum, and the threshold 0. Its own weights are
    those that are in its place: the initial ones, or what an earlier expert has learned.

    Returns:
        list of :class:`NewRow`. The values of the gates' rows are not written yet.
    """
    counted = [gate.counted for gate in block.gates]
    for gate in block.gates:
        gate.counts.zero_()
    if not any(num_tokens for num_tokens, _, _ in counted):
        return []
    alive, visits = ([0] * sum(block.strata) for _ in range(2))
    for gate, seen, (_, visits_E, _) in zip(block.gates, block.visible, counted):
        for e, live, number in zip(seen, gate.alive_E.tolist(), visits_E.tolist()):
            alive[e] = live
            visits[e] += number
    unserved = [bool(unserved_D.any()) for _, _, unserved_D in counted]
    gone, new = decide(alive, block.strata, visits, unserved)
    rows = []
    for gate, seen in zip(block.gates, block.visible):
        for e in filter(seen.__contains__, gone):
            gate.alive_E[e - seen.start] = False
        for stratum, e in new.items():
            if e in seen:
                unserved_D = counted[stratum][2]
                gate.alive_E[e - seen.start] = True
                rows.append(NewRow(gate.weight, e - seen.start, unserved_D / unserved_D.norm()))
                zero = gate.threshold.new_zeros(())
                rows.append(NewRow(gate.threshold, e - seen.start, zero))
    held = block.experts.held
    for e in filter(held.__contains__, new.values()):
        rows += [NewRow(parameter, held.index(e)) for parameter in block.experts.stacked()]
    return rows
