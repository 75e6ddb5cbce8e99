"""Which rank of a group of processes holds which experts, and the exchange of rows between them.

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
    """Ranks that share the experts where nobody says how many: the greatest number that divides
    that of the processes and every stratum.

    Each rank then holds as many experts of every stratum as the others, and has as much to do in
    every pass; a larger number that divides their sum alone would save memory, but have ranks
    wait for those with experts of late strata.
    """
    return math.gcd(num_processes, *strata)


def form_expert_group(size, timeout=None):
    """Divide all processes into groups of ``size`` consecutive ranks, which are on one machine
    where that is possible. Every process has to call this.

    Args:
        size: divides the number of processes.
        timeout: seconds that a rank waits for another; None for torch's own.

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
    """Ranks that hold the experts of every block together, a share each.

    Rank r of R holds the experts r, r + R, r + 2R, ...: as many of every stratum as the others,
    where R divides it, so that all have as much to do in every pass. Ranks of other groups that
    hold the same experts are its replicas.

    Args:
        ranks: torch's process group of the R ranks.
        replicas: process group of this rank and its replicas.
    """

    def __init__(self, ranks, replicas):
        self.ranks, self.replicas = ranks, replicas
        self.rank, self.size = dist.get_rank(ranks), dist.get_world_size(ranks)

    def __deepcopy__(self, _):
        return self  # of a model's copy as well: connections are no data

    def share(self, tensor_E):
        """The entries of this rank's experts, out of those of all experts."""
        return tensor_E[self.rank :: self.size]

    def sending_order(self, experts):
        """Place of each expert in the order in which their rows are sent: rank by rank.

        Args:
            experts: ``range`` of those that a gate sees.

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
        # plain, as numbers have no gradient
        rows_RL = rows_E.new_empty(self.size * len(own))
        dist.all_to_all_single(rows_RL, rows_E, [len(own)] * self.size, held_R, group=self.ranks)
        # the lengths of what is sent and received have to be known on the host
        numbers = iter(torch.cat([rows_E, rows_RL]).tolist())
        sent_R = [sum(next(numbers) for _ in range(held)) for held in held_R]
        received_R = [sum(next(numbers) for _ in own) for _ in range(self.size)]
        return Exchange.of(self.ranks, sent_R, received_R, rows_RL.view(self.size, len(own)), own)

    def all_experts(self, own_L):
        """Put the tensors that every rank has of its experts together: (L, ...) -> (R * L, ...)"""
        by_rank = own_L.new_empty(self.size * len(own_L), *own_L.shape[1:])
        dist.all_gather_into_tensor(by_rank, own_L.contiguous(), group=self.ranks)
        return by_rank.view(self.size, *own_L.shape).transpose(0, 1).flatten(0, 1)

    @torch.no_grad()
    def average_gradients(self, parameters):
        """Make the gradients of this rank's experts those of the mean of all processes' losses.

        What the tokens of the group's ranks add to them is there already, by the exchange; that of
        other groups' tokens is with the replicas.
        """
        num_processes = self.size * dist.get_world_size(self.replicas)
        waiting = []
        for parameter in parameters:
            if parameter.grad is None:  # other ranks wait for it
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
            norm: of the gradients of all but experts; a scalar.
            gradients: those of this rank's experts.
            sharded: whether every process has ``norm`` of a shard, in the place of all.
        """
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        of_experts = torch.stack([g.norm(dtype=dtype) for g in gradients]).square().sum()
        dist.all_reduce(of_experts, group=self.ranks)
        of_others = norm.square()
        if sharded:
            dist.all_reduce(of_others)
        return (of_others + of_experts).sqrt()


def _held_by(rank, size, experts):
    """The experts of a range that a rank holds, as a ``range`` of places among all that it holds."""
    first = max(0, -(-(experts.start - rank) // size))
    return range(first, max(first, -(-(experts.stop - rank) // size)))


@dataclass(frozen=True)
class Exchange:
    """The way of one gate's rows to the ranks of their experts, and back.

    Attributes:
        ranks: torch's process group.
        sent_R, received_R: rows to and from each rank.
        order_M: received rows come rank by rank; in this order they stand expert by expert.
        runs: the :class:`~fairseq_smoe.moe.dispatch.Runs` of the rows in that order.
        experts: ``range`` of the experts, counted among those that this rank holds.
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
        """(N, D) rows in sending order -> (M, D) rows of this rank's experts, one after another."""
        rows_MD = all_to_all_single_autograd(rows_ND, self.received_R, self.sent_R, self.ranks)
        return rows_MD.index_select(0, self.order_M)

    def send_back(self, rows_MD):
        """The inverse of :meth:`send`, for the experts' outputs."""
        rows_MD = rows_MD.index_select(0, self.order_M.argsort())
        return all_to_all_single_autograd(rows_MD, self.sent_R, self.received_R, self.ranks)
