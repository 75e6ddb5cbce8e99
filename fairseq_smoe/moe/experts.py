"""The base class of all kinds of experts, and the exchange of rows with other processes.

Letters in names: E experts of a block, D model dim, F hidden dim, N rows sorted by expert, M rows
received from all processes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.moe.dispatch import combine_rows, gather_rows
from fairseq_smoe.moe.kind import Kind

PADDING = ".experts.padding.zeros_E"  # how its name in a checkpoint ends


class Padding(nn.Module):
    """How many numbers of each expert are padding, for checkpoints. On every rank that of all
    experts.

    Attributes:
        of_expert: a list.
    """

    def __init__(self, zeros_E):
        super().__init__()
        self.of_expert = list(zeros_E)
        self.register_buffer("zeros_E", torch.tensor(self.of_expert))


class Experts(Kind, nn.Module):
    """All experts of a block, applied to rows that are sorted by expert.

    A subclass makes its parameters with :meth:`add_stacked`, and defines :meth:`share` and
    :meth:`multiply`.

    Args:
        strata: experts of each stratum.
        embed_dim, ffn_dim: D, F.
        options: an object of the class's ``Options``; None for the defaults.
        activation_fn: an elementwise function.
        activation_dropout: on the hidden units.
        group: :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` of the R ranks over which the
            experts are sharded. This process then has only the parameters of its E / R experts.
            None if it holds all experts.

    Attributes:
        loss_weights: ``{name: weight}`` of the experts' own losses (see :meth:`losses`); an entry
            for the gates' balance loss takes the place of the criterion's weight.
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
        self.loss_weights = {}
        self._stacked = []
        self._all_experts = None
        self.padding = None

    def add_stacked(self, name, tensor_E):
        """Make a parameter that is stacked over the experts, (E, ...). It is sharded if the experts
        are. Parameters that all experts have in common belong into a module of their own."""
        if self.group is not None:
            # the initial values are those of a process that holds all experts
            tensor_E = self.group.share(tensor_E).clone()
        parameter = nn.Parameter(tensor_E)
        if self.group is not None:
            parameter.expert = True  # fairseq's mark of parameters that differ between ranks
        self.register_parameter(name, parameter)
        self._stacked.append(name)

    def stacked(self):
        """The parameters made by :meth:`add_stacked`, in that order; between :meth:`gather` and
        :meth:`release`, those of the experts of all processes."""
        # not parameters(): in a fully sharded model these differ, and ours are only attributes
        return self._all_experts or [getattr(self, name) for name in self._stacked]

    def add_padding(self, zeros_E):
        """Declare that the parameters of the experts contain zeros which are no parameters, because
        experts of different sizes are stacked. The checkpoint records them.

        Args:
            zeros_E: how many numbers of each of the E experts are padding.
        """
        self.padding = Padding(zeros_E)

    def num_padding(self):
        """How many of the numbers that this process holds are padding."""
        if self.padding is None:
            return 0
        zeros_E = self.padding.of_expert
        return sum(zeros_E if self.group is None else self.group.share(zeros_E))

    def num_stored(self):
        """Numbers in the parameters of all experts, on whichever rank they are, with padding."""
        size = 1 if self.group is None else self.group.size
        return size * sum(getattr(self, name).numel() for name in self._stacked)

    def num_parameters(self):
        """Parameters of all experts, on whichever rank they are. Parameters that experts have in
        common do not count, nor does padding."""
        padding = 0 if self.padding is None else sum(self.padding.of_expert)
        return self.num_stored() - padding

    def params_used(self, visible, choices):
        """Mean number of parameters that a token is multiplied with in one pass, if it visits
        ``choices`` of the experts ``visible``, a ``range``, at random; to count FLOPs."""
        return choices * self.num_parameters() / sum(self.strata)

    def forward_flops(self):
        """FLOPs that a forward pass of the block takes whatever the number of tokens, on all ranks
        that share its experts together."""
        return 0

    def hidden_dim(self):
        """Mean number of hidden units of a row, to count memory."""
        return self.ffn_dim

    def token_hidden_dim(self, visible, choices):
        """Mean number of hidden units of a token in one pass besides those of its rows, to count
        memory; for the arguments see :meth:`params_used`."""
        return 0

    @property
    def trains_backbone(self):
        """Whether the model trains what a dense model has, too. If not, only the gates, the experts
        and parts of arrangements are trained."""
        return True

    def skipped_by_update(self, draw):
        """Parameters that an update of the optimizer leaves as they are: their gradients are
        dropped before clipping, and neither momentum nor weight decay changes them.

        Args:
            draw: ``random.Random``, in the same state on all ranks.
        """
        return ()

    @property
    def held(self):
        """The experts of the block that this process holds, as a ``range``."""
        everything = range(sum(self.strata))
        return everything if self.group is None else self.group.share(everything)

    @property
    def exchanges(self):
        """Whether rows go to other processes."""
        return self.group is not None and self._all_experts is None

    @torch.no_grad()
    def gather(self):
        """Gather the experts of all processes. Until :meth:`release`, this process computes alone
        and does not have to keep step with the others. Every process of the group has to call
        this."""
        if self.group is not None:
            self._all_experts = [self.group.all_experts(own) for own in self.stacked()]

    def release(self):
        """Free the experts of other processes."""
        self._all_experts = None

    def losses(self, choices, visible, here_T=None):
        """``{name: scalar}`` of one gate, beside the gate's own, before weighting.

        Args:
            choices: :class:`~fairseq_smoe.moe.gate.Choices`
            visible: ``range`` of the experts that the gate sees.
            here_T: marks the tokens that are at the gate; None if all are.
        """
        return {}

    def share(self, dtype):
        """What all passes of a block through the strata have in common, in one forward pass.

        Args:
            dtype: type of the tokens, to which the parameters are cast; autocast has precedence.

        Returns:
            An object that is passed to :meth:`multiply`. Its attribute ``waits`` says whether the
            host needs the numbers of rows, for which it waits for the device.
        """
        raise NotImplementedError

    def multiply(self, rows_ND, runs, shared, experts):
        """Apply each expert to its run of rows; see :meth:`forward`. ``experts`` are indices into
        the experts that this process holds."""
        raise NotImplementedError

    def visit(self, tokens_TD, choices, plan, weights_C, shared, visible, here_T=None):
        """The output of one pass, before the residual: by default the weighted sum of the outputs
        of a token's experts (paper, eq. 6).

        Args:
            tokens_TD: normalised tokens.
            choices: the gate's :class:`~fairseq_smoe.moe.gate.Choices`.
            plan: :class:`~fairseq_smoe.moe.dispatch.Dispatch`
            weights_C: weight of every choice.
            shared: what :meth:`share` returned.
            visible: ``range`` of the experts that the gate sees.
            here_T: True for the tokens that are at the gate; None for all.

        Returns:
            (T, D)
        """
        rows_ND = self(gather_rows(tokens_TD, plan), plan, shared, visible)
        return combine_rows(rows_ND, weights_C, plan, len(tokens_TD), choices.most)

    def forward(self, rows_ND, runs, shared, experts):
        """Apply each expert to its run of rows, whichever process holds the expert.

        Args:
            rows_ND: rows sorted by expert; if they are exchanged, in the group's sending order.
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
        if exchange.experts:  # a process may hold no experts of late strata
            rows_MD = self.multiply(rows_MD, exchange.runs, shared, exchange.experts)
        return exchange.send_back(rows_MD)
