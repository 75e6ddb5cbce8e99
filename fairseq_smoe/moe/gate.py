"""What every gate has to do.

Letters in names: T tokens at the gate, D model dim, E experts the gate sees, C choices, each a token
and one of the experts that it visits.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fairseq_smoe.moe.kind import Kind
from fairseq_smoe.moe.routing import balance_loss, gate_logits

BALANCE_LOSS = "moe_gate_loss"  # its weight is the criterion's --moe-gate-loss-wt


@dataclass(frozen=True)
class Choices:
    """Which experts the tokens at a gate visit. A token may visit any number of them, or none.

    Experts are counted from the first one that the gate sees.

    Attributes:
        scores_TE: of all experts, in at least float32 and with a gradient.
        best_T: the expert whose stratum decides where the token goes next.
        expert_C, token_C: the choices, int64. Where an expert is full, the later ones are dropped.
    """

    scores_TE: torch.Tensor
    best_T: torch.Tensor
    expert_C: torch.Tensor
    token_C: torch.Tensor

    @classmethod
    def ranked(cls, scores_TE, experts_KT):
        """K choices for every token, best first."""
        num_choices, num_tokens = experts_KT.shape
        token_C = torch.arange(num_tokens, device=experts_KT.device).repeat(num_choices)
        return cls(scores_TE, experts_KT[0], experts_KT.reshape(-1), token_C)

    @classmethod
    def where(cls, scores_TE, visits_TE):
        """The pairs that ``visits_TE`` marks, the best ones of all tokens first; the host waits for
        the device to learn how many there are."""
        best_T = scores_TE.argmax(dim=1)
        token_C, expert_C = visits_TE.nonzero().unbind(1)
        order_C = (expert_C != best_T[token_C]).long().argsort(stable=True)
        return cls(scores_TE, best_T, expert_C[order_C], token_C[order_C])


class Gate(Kind, nn.Module):
    """Decides which experts the tokens at one stratum visit, with which weights.

    A block makes one gate for every stratum and calls ``gate(tokens)``, then :meth:`weights` and
    :meth:`losses`. A gate of one's own defines :meth:`forward`, and what else shall differ.

    Args:
        embed_dim: D.
        num_experts: E.
        options: of the class's ``Options``; None for their defaults.

    Attributes:
        weight: (E, D) parameter, what :meth:`logits` multiplies with.
        loss_weights: ``{name: weight}`` of what :meth:`losses` returns beside the balance loss.
    """

    def __init__(self, embed_dim, num_experts, options=None):
        super().__init__()
        self.options = self.Options() if options is None else options
        self.weight = nn.Parameter(torch.empty(num_experts, embed_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as nn.Linear
        self.loss_weights = {}

    def extra_repr(self):
        num_experts, embed_dim = self.weight.shape
        return f"{embed_dim}, {num_experts}"

    def logits(self, tokens_TD):
        """(T, E) in at least float32 (paper, eq. 5)."""
        return gate_logits(tokens_TD, self.weight)

    def forward(self, tokens_TD, here_T=None):
        """The :class:`Choices` of the tokens.

        Args:
            here_T: the tokens that stand at this gate, where others go along (see
                :class:`~fairseq_smoe.moe.selection.Masked`), whose choices are not dispatched; None
                for all.
        """
        raise NotImplementedError

    def capacity(self, num_tokens):
        """Rows that an expert takes in training, of so many tokens at the gate; None for no limit.

        Args:
            num_tokens: a number, or a scalar tensor where the device alone knows.
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
        """``{name: scalar}``, before their weights; the training logs them by their names."""
        return {BALANCE_LOSS: balance_loss(choices.scores_TE, choices.best_T, here_T)}

    @torch.no_grad()
    def expected_choices(self):
        """Experts that a token visits where no expert is better than another, to count FLOPs."""
        num_experts, embed_dim = self.weight.shape
        with torch.device("cpu"):
            twin = type(self)(embed_dim, num_experts, self.options).eval()
            return len(twin(torch.zeros(1, embed_dim)).expert_C)
