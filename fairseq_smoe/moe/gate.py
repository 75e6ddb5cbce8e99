"""The base class of all gates.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, C choices, which are
token-expert pairs.
"""

import math
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from fairseq_smoe.moe.kind import Kind
from fairseq_smoe.moe.routing import balance_loss, gate_logits

BALANCE_LOSS = "moe_gate_loss"  # weighted by the criterion's --moe-gate-loss-wt


@dataclass(frozen=True)
class Choices:
    """Which experts the tokens at a gate visit. A token may visit any number of them, or none.

    Experts are numbered from the first one that the gate sees.

    Attributes:
        scores_TE: scores of all experts, in at least float32 and with a gradient.
        best_T: the expert of each token whose stratum decides where the token goes next.
        expert_C, token_C: the choices, int64. When an expert is full, later choices of it are
            dropped.
        most: the most choices that a token may have; None if that is not known.
        counts: what the gate has counted, to be added to its buffer of that name; None for nothing.
    """

    scores_TE: torch.Tensor
    best_T: torch.Tensor
    expert_C: torch.Tensor
    token_C: torch.Tensor
    most: Optional[int] = None
    counts: Optional[torch.Tensor] = None

    @classmethod
    def ranked(cls, scores_TE, experts_KT):
        """K choices for every token, best first."""
        num_choices, num_tokens = experts_KT.shape
        token_T = torch.arange(num_tokens, device=experts_KT.device)
        token_C = token_T.expand(num_choices, -1).reshape(-1)  # repeat() takes much longer
        return cls(scores_TE, experts_KT[0], experts_KT.reshape(-1), token_C, num_choices)

    @classmethod
    def where(cls, scores_TE, visits_TE):
        """The pairs that ``visits_TE`` marks, ordered so that the best choices of all tokens come
        first. The host waits for the device to learn how many pairs there are."""
        best_T = scores_TE.argmax(dim=1)
        token_C, expert_C = visits_TE.nonzero().unbind(1)
        order_C = (expert_C != best_T[token_C]).long().argsort(stable=True)
        return cls(scores_TE, best_T, expert_C[order_C], token_C[order_C])


class Gate(Kind, nn.Module):
    """Decides which experts the tokens at one stratum visit, with which weights.

    A block makes one gate for every stratum and calls ``gate(tokens)``, then :meth:`weights` and
    :meth:`losses`. A subclass has to define :meth:`forward`; it may override the other methods.

    Args:
        embed_dim: D.
        num_experts: E.
        options: an object of the class's ``Options``; None for the defaults.

    Attributes:
        weight: (E, D) parameter that :meth:`logits` multiplies with.
        logit_bias: (E,) parameter that it adds; None unless :meth:`add_bias` has been called.
        loss_weights: ``{name: weight}`` of the losses other than the balance loss; an entry for
            the balance loss takes the place of the criterion's weight.
        stratum: number of the gate's stratum, from 0. The block sets it.
        sizes: number of experts of each stratum that the gate sees, its own first.
        alive_E: (E,) bool buffer, the experts that tokens may visit; None for all.
        closed_E: (E,) bool buffer, the experts whose logits are -inf; None for none. Not saved.
        counts: int64 buffer, the sums of what the gate has counted in training, over the tokens of
            all processes; None for a gate that counts nothing.
        recording: whether the gate counts in the next forward passes.
    """

    recording = False

    def __init__(self, embed_dim, num_experts, options=None):
        super().__init__()
        self.options = self.Options() if options is None else options
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        self.register_parameter("logit_bias", None)
        self.loss_weights = {}
        self.stratum = 0
        self.sizes = self._initially_alive = (num_experts,)
        self.register_buffer("alive_E", None)
        self.register_buffer("closed_E", None, persistent=False)
        self.register_buffer("counts", None)

    @classmethod
    def pool(cls, strata, options):
        """Sizes of the strata of a model that has the experts of ``strata`` at the start. They are
        larger if the gate may add experts.

        Args:
            options: an object of the class's ``Options``.
        """
        return strata

    def enter(self, sizes, alive):
        """Become one of the gates of a block.

        Args:
            sizes: experts of each stratum that the gate sees, its own first.
            alive: how many of each of them, the first ones, are alive at the start.
        """
        self.sizes, self._initially_alive = tuple(sizes), tuple(alive)

    def add_bias(self):
        """Add a number to each expert's logit, at first 0."""
        self.logit_bias = nn.Parameter(self.weight.new_zeros(len(self.weight)))

    def close(self, closed_E):
        """Let no token visit the experts that (E,) bool marks."""
        self.closed_E = closed_E.to(self.weight.device)

    def num_alive(self):
        """How many experts of each stratum that the gate sees, its own first, are alive; on the
        meta device, at the start."""
        if self.alive_E is None or self.alive_E.is_meta:
            return list(self._initially_alive)
        return [int(own.sum()) for own in self.alive_E.split(self.sizes)]

    def extra_repr(self):
        num_experts, embed_dim = self.weight.shape
        return f"{embed_dim}, {num_experts}"

    def logits(self, tokens_TD):
        """(T, E) in at least float32 (paper, eq. 5)."""
        logits_TE = gate_logits(tokens_TD, self.weight, self.logit_bias)
        if self.closed_E is None:
            return logits_TE
        return logits_TE.masked_fill(self.closed_E, -math.inf)

    def forward(self, tokens_TD, here_T=None):
        """The :class:`Choices` of the tokens.

        Args:
            here_T: True for the tokens that are at this gate. The others are only carried along
                (see :class:`~fairseq_smoe.moe.selection.Masked`), and their choices are not
                dispatched. None if all tokens are at this gate.
        """
        raise NotImplementedError

    def preferences(self, tokens_TD):
        """(T, E): the better an expert is for a token, the greater. Ranks experts for a view in
        which tokens visit the k-th best (:mod:`~fairseq_smoe.moe.single_expert`). By default the
        scores of :meth:`forward`."""
        return self(tokens_TD).scores_TE

    def capacity(self, num_tokens):
        """Maximum number of rows of an expert in training; None for no limit.

        Args:
            num_tokens: number of tokens at the gate; a scalar tensor if only the device knows it.
        """
        return None

    def weights(self, choices, kept_C=None):
        """(C,) weight of every choice in its token's output.

        Args:
            kept_C: False where a choice was dropped; None when none was.
        """
        weights_C = choices.scores_TE[choices.token_C, choices.expert_C]
        return weights_C if kept_C is None else weights_C * kept_C

    def losses(self, choices, here_T=None):
        """``{name: scalar}`` before weighting; training logs each under its name."""
        return {BALANCE_LOSS: balance_loss(choices.scores_TE, choices.best_T, here_T)}

    def records(self, update):
        """Whether the gate counts in the forward passes for an update, numbered from 1."""
        return False

    @classmethod
    def after_update(cls, block, update):
        """Called once after every update if the gates of the block have :attr:`counts`. May change
        the gates' buffers. All processes have to come to the same result.

        Returns:
            list of :class:`~fairseq_smoe.moe.pool.NewRow`, which the caller writes into parameters
            and optimizer.
        """
        return []

    @torch.no_grad()
    def expected_choices(self):
        """Number of experts that a token visits if all have the same score; to count FLOPs."""
        num_experts, embed_dim = self.weight.shape
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # counting changes nothing
            twin = type(self)(embed_dim, num_experts, self.options).eval()
            twin.stratum = self.stratum
            return len(twin(torch.zeros(1, embed_dim)).expert_C)
