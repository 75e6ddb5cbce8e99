"""What every kind of experts has to do, and the way of their rows to other processes.

Letters in names: E experts of a block, D model dim, F hidden dim, N rows sorted by expert, M rows
received from all processes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.moe.kind import Kind


class Experts(Kind, nn.Module):
    """All experts of a block, applied to rows that stand expert by expert.

    A kind of one's own makes its parameters with :meth:`add_stacked`, and defines :meth:`share` and
    :meth:`multiply`.

    Args:
        strata: experts of each stratum.
        embed_dim, ffn_dim: D, F.
        options: of the class's ``Options``; None for their defaults.
        activation_fn: element by element.
        activation_dropout: on the hidden units.
        group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` of processes that share the
            experts: this one holds E / R of them, and the parameters are those. None for a process
            that holds all.
    """

    def __init__(
        self,
        strata,
        embed_dim,
        ffn_dim,
        options=None,
        activation_fn=F.relu,
        activation_dropout=0.0,
        group=None,
    ):
        super().__init__()
        self.options = self.Options() if options is None else options
        self.strata, self.embed_dim, self.ffn_dim = tuple(strata), embed_dim, ffn_dim
        self.activation_fn = activation_fn
        self.activation_dropout = activation_dropout
        self.group = group
        self._stacked = []
        self._all_experts = None

    def add_stacked(self, name, tensor_E):
        """Make a parameter that is stacked over the experts, (E, ...), and held in shares by
        processes that share them. What experts have in common belongs into a module of its own."""
        if self.group is not None:
            tensor_E = self.group.share(tensor_E).clone()  # the same as with a process for all
        parameter = nn.Parameter(tensor_E)
        if self.group is not None:
            parameter.expert = True  # fairseq's mark of what ranks do not have in common
        self.register_parameter(name, parameter)
        self._stacked.append(name)

    def stacked(self):
        """The parameters of :meth:`add_stacked`, in their order; between :meth:`gather` and
        :meth:`release`, those of all processes."""
        # not parameters(): a model that is sharded has others, and these as attributes
        return self._all_experts or [getattr(self, name) for name in self._stacked]

    @property
    def exchanges(self):
        """Whether rows go to other processes."""
        return self.group is not None and self._all_experts is None

    @torch.no_grad()
    def gather(self):
        """Get the experts of all processes, to compute alone until :meth:`release`: for those that
        do not go through the same steps. Every process of the group has to call this."""
        if self.group is not None:
            self._all_experts = [self.group.all_experts(own) for own in self.stacked()]

    def release(self):
        """Let go of other processes' experts."""
        self._all_experts = None

    def share(self, dtype):
        """What all passes of a block through the strata have in common, in one forward pass.

        Args:
            dtype: of the tokens, to which the parameters are cast; autocast has precedence.

        Returns:
            An object that goes to :meth:`multiply`. Its ``waits`` says whether the host has to know
            numbers of rows, for which it waits for the device.
        """
        raise NotImplementedError

    def multiply(self, rows_ND, runs, shared, experts):
        """Apply to each run of rows its expert; see :meth:`forward`. ``experts`` counts among those
        that this process holds."""
        raise NotImplementedError

    def forward(self, rows_ND, runs, shared, experts):
        """Apply to each run of rows its expert, wherever that is.

        Args:
            rows_ND: rows sorted by expert; where they are exchanged, in the group's sending order.
            runs: :class:`~fairseq_smoe.moe.dispatch.Runs` of the rows.
            shared: what :meth:`share` returned.
            experts: ``range`` of those that the runs belong to.

        Returns:
            (N, D)
        """
        if not self.exchanges:
            return self.multiply(rows_ND, runs, shared, experts)
        exchange = self.group.exchange(runs.rows_E, experts)
        rows_MD = exchange.send(rows_ND)
        if exchange.experts:  # of late strata, a process may have none
            rows_MD = self.multiply(rows_MD, exchange.runs, shared, exchange.experts)
        return exchange.send_back(rows_MD)
