"""Expert parallelism: which rank of a group holds which experts, and the all-to-all of rows.

Letters in names: R ranks of the group, E experts a gate sees, L those of them that this rank holds,
N rows sent, M rows received, D model dim.
"""

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from fairseq_smoe.moe.dispatch import Runs


def default_group_size(num_processes, strata):
    """The default number of ranks over which the experts are sharded: the greatest number that
    divides the number of processes and every stratum.

    All ranks then hold the same number of experts of every stratum, which spreads the work of every
    pass evenly. A larger number that divides only the sum of the strata would save memory, but
    ranks would wait for those that hold experts of late strata.
    """
    return math.gcd(num_processes, *strata)


def form_expert_group(size, timeout=None):
    """Divide all ranks into groups of ``size`` consecutive ranks. Consecutive ranks are on the same
    machine if possible. Every rank has to call this.

    Args:
        size: divides the number of processes.
        timeout: seconds that a rank waits for another; None for torch's default.

    Returns:
        The :class:`ExpertGroup` of this process, or None for a size of 1.
    """
    if size == 1:
        return None
    processes = range(dist.get_world_size())
    waiting = None if timeout is None else timedelta(seconds=timeout)
    ranks, _ = dist.new_subgroups_by_enumeration(
        [processes[first : first + size] for first in processes[::size]], timeout=waiting
    )
    replicas, _ = dist.new_subgroups_by_enumeration(
        [processes[place::size] for place in range(size)], timeout=waiting
    )
    return ExpertGroup(ranks, replicas)


class ExpertGroup:
    """A group of ranks over which the experts of every block are sharded.

    Rank r of R holds the experts r, r + R, r + 2R, ... If R divides every stratum, all ranks hold
    the same number of experts of every stratum, which spreads the work of every pass evenly. The
    ranks of other groups that hold the same experts are the rank's replicas.

    Args:
        ranks: torch's process group of the R ranks.
        replicas: process group of this rank and its replicas.
    """

    def __init__(self, ranks, replicas):
        self.ranks, self.replicas = ranks, replicas
        self.rank, self.size = dist.get_rank(ranks), dist.get_world_size(ranks)

    def __deepcopy__(self, _):
        return self  # a copy of a model uses the same process groups

    def share(self, tensor_E):
        """The entries of this rank's experts in a tensor over all experts."""
        return tensor_E[self.rank :: self.size]

    def sending_order(self, experts):
        """The place of each expert in the order in which rows are sent, which is rank by rank.

        Args:
            experts: ``range`` of the experts that a gate sees.

        Returns:
            (E,) int64 permutation.
        """
        by_rank = sorted(experts, key=lambda e: (e % self.size, e))
        return torch.tensor([by_rank.index(e) for e in experts])

    def exchange(self, rows_E, experts):
        """Tell all ranks how many rows each of their experts gets.

        Args:
            rows_E: rows of this rank's tokens for each expert, in :meth:`sending_order`.
            experts: ``range`` of the E experts.

        Returns:
            :class:`Exchange`
        """
        held_R = [len(_held_by(r, self.size, experts)) for r in range(self.size)]
        own = _held_by(self.rank, self.size, experts)
        # not torch's differentiable version: counts have no gradient
        rows_RL = rows_E.new_empty(self.size * len(own))
        dist.all_to_all_single(rows_RL, rows_E, [len(own)] * self.size, held_R, group=self.ranks)
        # all-to-all needs the numbers of rows on the host
        numbers = iter(torch.cat([rows_E, rows_RL]).tolist())
        sent_R = [sum(next(numbers) for _ in range(held)) for held in held_R]
        received_R = [sum(next(numbers) for _ in own) for _ in range(self.size)]
        return Exchange.of(self.ranks, sent_R, received_R, rows_RL.view(self.size, len(own)), own)

    def all_experts(self, own_L):
        """All-gather a tensor over this rank's experts: (L, ...) -> (R * L, ...), in expert
        order."""
        by_rank = own_L.new_empty(self.size * len(own_L), *own_L.shape[1:])
        dist.all_gather_into_tensor(by_rank, own_L.contiguous(), group=self.ranks)
        return by_rank.view(self.size, *own_L.shape).transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def average_gradients(self, parameters):
        """Average the gradients of this rank's experts, so that they are those of the mean loss of
        all ranks.

        The gradients already cover the tokens of all ranks of this group, because those were sent
        to the experts. The replicas have the gradients for the tokens of other groups.
        """
        num_processes = self.size * dist.get_world_size(self.replicas)
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:  # the replicas wait for this rank
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(num_processes)
            if num_processes > self.size:
                waiting.append(dist.all_reduce(parameter.grad, group=self.replicas, async_op=True))
        for work in waiting:
            work.wait()

    @torch.no_grad()
    def norm_with_experts(self, norm, gradients, sharded=False):
        """Norm of the gradients of the whole model.

        Args:
            norm: norm of the gradients of all parameters but experts; a scalar.
            gradients: those of this rank's experts.
            sharded: whether ``norm`` covers only this rank's shard of those parameters.
        """
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        of_experts = torch.stack([g.norm(dtype=dtype) for g in gradients]).square().sum()
        dist.all_reduce(of_experts, group=self.ranks)
        of_others = norm.square()
        if sharded:
            dist.all_reduce(of_others)
        return (of_others + of_experts).sqrt()


def _held_by(rank, size, experts):
    """The experts of a range that a rank holds, as a ``range`` of indices into the rank's
    experts."""
    first = max(0, -(-(experts.start - rank) // size))
    return range(first, max(first, -(-(experts.stop - rank) // size)))


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one gate's rows to the ranks of their experts, and back.

    Attributes:
        ranks: torch's process group.
        sent_R, received_R: number of rows to and from each rank.
        order_M: permutation that sorts the received rows, which come rank by rank, by expert.
        runs: the :class:`~fairseq_smoe.moe.dispatch.Runs` of the sorted rows.
        experts: ``range`` of this gate's experts on this rank, as indices into the rank's experts.
    """

    ranks: dist.ProcessGroup
    sent_R: list
    received_R: list
    order_M: torch.Tensor
    runs: Runs
    experts: range

    @classmethod
    def of(cls, ranks, sent_R, received_R, rows_RL, experts):
        num_rows = sum(received_R)
        expert_RL = torch.arange(len(experts), device=rows_RL.device).repeat(len(received_R))
        expert_M = expert_RL.repeat_interleave(rows_RL.flatten(), output_size=num_rows)
        order_M = expert_M.argsort(stable=True)
        return cls(ranks, sent_R, received_R, order_M, Runs(rows_RL.sum(0), num_rows), experts)

    def send(self, rows_ND):
        """(N, D) rows in sending order -> (M, D) received rows, sorted by this rank's experts."""
        rows_MD = all_to_all_single_autograd(rows_ND, self.received_R, self.sent_R, self.ranks)
        return rows_MD.index_select(0, self.order_M)

    def send_back(self, rows_MD):
        """The inverse of :meth:`send`, for the experts' outputs."""
        rows_MD = rows_MD.index_select(0, self.order_M.argsort())
        return all_to_all_single_autograd(rows_MD, self.sent_R, self.received_R, self.ranks)
