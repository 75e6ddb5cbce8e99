"""Merging the experts of a block group by group, and the gates' rows with them (Zhang et al. 2024,
arXiv 2407.09590, stage 3).

Letters in names: E experts before, G groups, which are the experts after.
"""

from dataclasses import dataclass

import torch

from fairseq_smoe.checkpoints.parts import is_expert_parameter
from fairseq_smoe.moe.strata import own_experts, visible_experts


@dataclass(frozen=True)
class Layout:
    """The strata of a block.

    Attributes:
        strata: experts of each.
        stacked: whether each gate sees its own stratum only.
    """

    strata: tuple
    stacked: bool = False

    @property
    def own(self):
        """The experts of each stratum, as ``range`` s."""
        return own_experts(self.strata)

    @property
    def visible(self):
        """The experts that each gate sees, as ``range`` s."""
        return self.own if self.stacked else visible_experts(self.strata)


@dataclass(frozen=True)
class Merger:
    """Which experts of a block are merged into which.

    Attributes:
        before, after: :class:`Layout` of the block.
        groups: list of lists of experts, in the order of the experts that they become.
        bias: whether the gates get the logarithm of the number of experts in a group as a bias.
    """

    before: Layout
    after: Layout
    groups: list
    bias: bool = False

    def equal_weights(self):
        """(G, E): 1 / n for each of the n experts of a group."""
        weights_GE = torch.zeros(len(self.groups), sum(self.before.strata), dtype=torch.float64)
        for weights_E, members in zip(weights_GE, self.groups):
            weights_E[members] = 1 / len(members)
        return weights_GE

    def visit_weights(self, visits_E):
        """(G, E): the share of each expert in the visits of its group; equal if there are none."""
        weights_GE = self.equal_weights()
        for weights_E, members in zip(weights_GE, self.groups):
            visits = visits_E[members].double()
            if visits.any():
                weights_E[members] = visits / visits.sum()
        return weights_GE

    def most_visited(self, visits_E):
        """The most visited expert of each group, the first if there are several."""
        return [max(members, key=lambda e: (int(visits_E[e]), -e)) for members in self.groups]

    def apply(self, state, weights_GE, mean=None):
        """The parameters and buffers of the merged block.

        Every expert, and its row in every gate that sees it, is the weighted sum of those of its
        group.

        Args:
            state: ``{name: tensor}`` of the gates and the experts, by their names in the block.
            weights_GE: each row sums to 1.
            mean: ``mean(tensor_E, weights_GE)``; :func:`weighted_mean` by default.

        Returns:
            ``{name: tensor}`` of those that change.
        """
        mean = mean or weighted_mean
        merged = {}
        for name, tensor in state.items():
            if is_expert_parameter(f".expert_block.{name}"):
                merged[name] = mean(tensor, weights_GE)
        for i, (old, new) in enumerate(zip(self.before.visible, self.after.visible)):
            weights = weights_GE[new.start : new.stop, old.start : old.stop]
            for name in ("weight", "threshold", "logit_bias"):
                rows_E = state.get(f"gates.{i}.{name}")
                if rows_E is not None:
                    merged[f"gates.{i}.{name}"] = mean(rows_E, weights)
            own = [[e - old.start for e in self.groups[g]] for g in new]
            rows_ED, alive_E = state[f"gates.{i}.weight"], state.get(f"gates.{i}.alive_E")
            if self.bias:
                bias_E = state.get(f"gates.{i}.logit_bias", rows_ED.new_zeros(len(rows_ED)))
                # that of one expert with the probability of all of them together
                merged[f"gates.{i}.logit_bias"] = torch.stack(
                    [bias_E[members].double().logsumexp(0) for members in own]
                ).to(bias_E.dtype)
            if alive_E is not None:
                merged[f"gates.{i}.alive_E"] = alive_E[[members[0] for members in own]]
                counts = state[f"gates.{i}.counts"]
                merged[f"gates.{i}.counts"] = counts.new_zeros(len(counts) - len(old) + len(new))
        return merged


def weighted_mean(tensor_E, weights_GE):
    """(E, ...) and (G, E) -> (G, ...). An expert alone with the weight 1 is copied bit by bit; sums
    are in float32 at least."""
    merged_G = tensor_E.new_empty(len(weights_GE), *tensor_E.shape[1:])
    exact = torch.promote_types(tensor_E.dtype, torch.float32)
    for merged, weights_E in zip(merged_G, weights_GE):
        members = weights_E.nonzero().flatten().tolist()
        if len(members) == 1 and weights_E[members[0]] == 1:
            merged.copy_(tensor_E[members[0]])
        else:
            merged.copy_(sum(tensor_E[e].to(exact) * float(weights_E[e]) for e in members))
    return merged_G


def differentiable_mean(tensor_E, weights_GE):
    """:func:`weighted_mean` with a gradient for the weights."""
    weights_GE = weights_GE.to(tensor_E.dtype)
    return (weights_GE @ tensor_E.flatten(1)).view(len(weights_GE), *tensor_E.shape[1:])
