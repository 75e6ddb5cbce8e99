"""Feed-forward networks that are split into small experts (MoEfication, Zhang et al. 2022, arXiv
2110.01786).

Letters in names: N rows sorted by expert, E experts of the block, D model dim, F hidden dim; and
for the small experts into which each of the E is split: P their number, W = F / P hidden units of
each, K of them that a row keeps.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.dispatch import combine_rows, gather_rows, plan_dispatch
from fairseq_smoe.moe.expert_kinds.ffn import (
    FFNExperts,
    FFNOptions,
    SharedExperts,
    autocast_type,
    two_layers,
)
from fairseq_smoe.moe.kind import option
from fairseq_smoe.moe.shared_weight import SharedWeight
from fairseq_smoe.moe.small_counts import SELECT, check_split, number_kept
from fairseq_smoe.moe.small_experts import SmallExperts, sum_of_chosen
from fairseq_smoe.moe.small_router import centres, router_shapes, scores, true_scores

NAME = "moefied"


@dataclass
class MoefiedOptions(FFNOptions):
    moefy_dense: bool = option(
        False,
        "MoEfication: split every dense FFN into small experts, of which each token takes the "
        "best; 'python -m fairseq_smoe convert moefy' makes such models. --moe-experts moefied "
        "does the same inside the experts of expert layers",
    )
    moefy_experts: int = option(0, "number of small experts into which each FFN is split")
    moefy_k: str = option(
        "0",
        "small experts that a token keeps: a number, 0 for all, or a percentage. May be changed "
        "for translation with --model-overrides",
    )
    moefy_select: str = option(
        "mlp",
        "how a token chooses small experts: 'mlp' a trained router, 'similarity' the mean vector "
        "of an expert, 'oracle' computes all of the first layer to find the best, for analysis",
    )

    def check(self, strata, options):
        experts_too = options.moe_experts == NAME
        if not (self.moefy_dense or experts_too):
            return self.refuse_given(options.moe_experts, "--moefy-dense or --moe-experts moefied")
        if self.moefy_experts < 1:
            raise OptionError(
                f"--moefy-experts {self.moefy_experts}: expected the number of small experts into "
                "which each FFN is split; 32 hidden units each are usual"
            )
        number_kept(self.moefy_k, self.moefy_experts)
        if self.moefy_select not in SELECT:
            raise OptionError(
                f"--moefy-select {self.moefy_select}: expected {', '.join(SELECT[:-1])} or "
                f"{SELECT[-1]}"
            )
        activation = str(getattr(options, "activation_fn", "relu"))
        if activation != "relu":
            raise OptionError(
                f"--activation-fn {activation} with small experts: only after relu are hidden "
                "units zero; use relu"
            )
        if experts_too:
            super().check(strata, options)


class MoefiedExperts(FFNExperts):
    """Feed-forward networks with ReLU whose hidden units are divided into P small experts. Of
    these, each row keeps the K with the highest scores, and their outputs are added up without
    weights. The bias of the second layer is added once. With K = P this is the plain network, for
    any division.

    The chosen small experts are computed alone. No product covers hidden units that a row has not
    chosen, except for ``moefy_select="oracle"``, which needs the first layer to choose.

    The scores are from a router for each of the E networks, which is not trained here: it has been
    fitted when the model was converted. A network that is made anew divides its units in their
    order, and its router starts from the mean vectors of the small experts.

    Parameters: ``fc1_weight`` (E, F, D), ``fc1_bias`` (E, F), ``fc2_weight`` (E, F, D),
    ``fc2_bias`` (E, D), with the units of a small expert one after another; and of the routers,
    without gradients, ``router_in`` (E, P, D) and ``router_out`` (E, P, P).

    Attributes:
        num_small, kept: P, K.
    """

    name = NAME
    Options = MoefiedOptions

    def make_parameters(self):
        self.num_small = self.options.moefy_experts
        self.kept = number_kept(self.options.moefy_k, self.num_small)
        check_split(self.num_small, self.ffn_dim)
        number, dim, hidden = sum(self.strata), self.embed_dim, self.ffn_dim

        def uniform(fan_in, *shape):  # as in nn.Linear
            bound = 1 / math.sqrt(fan_in)
            return torch.empty(number, *shape).uniform_(-bound, bound)

        self.add_stacked("fc1_weight", uniform(dim, hidden, dim))
        self.add_stacked("fc1_bias", uniform(dim, hidden))
        self.add_stacked("fc2_weight", uniform(hidden, hidden, dim))
        self.add_stacked("fc2_bias", uniform(hidden, dim))
        shapes = router_shapes(self.options.moefy_select, self.num_small, dim)
        for name, shape in shapes.items():
            self.add_stacked(name, torch.zeros(number, *shape))
            getattr(self, name).requires_grad_(False)
        self.start_routers()

    @torch.no_grad()
    def start_routers(self):
        """Set the routers to where their training begins."""
        if hasattr(self, "router_in"):
            small_EPWD = self.fc1_weight.unflatten(1, (self.num_small, -1))
            self.router_in.copy_(centres(small_EPWD))
        if hasattr(self, "router_out"):
            self.router_out.copy_(torch.eye(self.num_small, device=self.router_out.device))

    @property
    def keeps_all(self):
        return self.kept == self.num_small

    def share(self, dtype):
        """:class:`SharedMoefied`, or if all small experts are kept,
        :class:`~fairseq_smoe.moe.expert_kinds.ffn.SharedExperts`."""
        w1_EFD, b1_EF, w2_EFD, b2_ED, *routers = self.stacked()
        dtype = autocast_type(w1_EFD.device.type, dtype)
        if dtype != w1_EFD.dtype:
            w1_EFD, b1_EF, w2_EFD, b2_ED = (p.to(dtype) for p in (w1_EFD, b1_EF, w2_EFD, b2_ED))
        if self.keeps_all:
            grouped = self.multiplies_in_groups(w1_EFD.transpose(1, 2))
            weights = SharedWeight(w1_EFD.transpose(1, 2), b1_EF), SharedWeight(w2_EFD, b2_ED)
            return SharedExperts(*weights, grouped, waits=not grouped or self.exchanges)
        width = self.ffn_dim // self.num_small
        small = SmallExperts(
            w1_EFD.view(-1, width, self.embed_dim),
            b1_EF.view(-1, width),
            w2_EFD.view(-1, width, self.embed_dim),
        )
        return SharedMoefied(small, b2_ED, routers, self)

    def multiply(self, rows_ND, runs, shared, experts):
        if self.keeps_all:
            return super().multiply(rows_ND, runs, shared, experts)
        rows_ND = rows_ND.to(shared.bias_ED.dtype)
        sizes = runs.rows_per_expert if len(experts) > 1 else [len(rows_ND)]
        choice_NK = self._choose(rows_ND, sizes, shared, experts)
        small = range(experts.start * self.num_small, experts.stop * self.num_small)
        if self._in_place(rows_ND):
            sum_ND = sum_of_chosen(rows_ND, choice_NK, shared.small.of(small))
        else:
            sum_ND = self._by_dispatch(rows_ND, choice_NK, shared, small)
        if len(experts) == 1:
            return sum_ND + shared.bias_ED[experts.start]
        return sum_ND + shared.bias_ED[experts.start : experts.stop].repeat_interleave(
            torch.tensor(sizes, device=rows_ND.device), 0, output_size=len(rows_ND)
        )

    def _in_place(self, rows_ND):
        drops = self.training and self.activation_dropout
        plain = rows_ND.device.type == "cpu" and not (torch.is_grad_enabled() or drops)
        return plain and rows_ND.dtype in (torch.float32, torch.float64)

    @torch.no_grad()
    def _choose(self, rows_ND, sizes, shared, experts):
        """The small experts (N, K) that each row keeps, numbered from the first of ``experts``."""
        chosen = []
        for i, (e, rows) in enumerate(zip(experts, rows_ND.split(sizes))):
            if self.options.moefy_select == "oracle":
                fc1, own = shared.small, slice(e * self.num_small, (e + 1) * self.num_small)
                weights = fc1.fc1_weight_PWD[own].flatten(0, 1), fc1.fc1_bias_PW[own].flatten()
                scores_NP = true_scores(F.linear(rows, *weights).relu_(), self.num_small)
            else:
                routers = (router[e] for router in shared.routers)
                scores_NP = scores(self.options.moefy_select, rows, *routers)
            best_NK = scores_NP.topk(self.kept, dim=1, sorted=False).indices
            chosen.append(best_NK.add_(i * self.num_small) if i else best_NK)
        return torch.cat(chosen) if len(chosen) > 1 else chosen[0]

    def _by_dispatch(self, rows_ND, choice_NK, shared, small):
        """The sum of the chosen outputs (N, D), with gradients and on any device: a copy of each
        row for each of its small experts."""
        row_C = torch.arange(len(rows_ND), device=rows_ND.device).repeat_interleave(self.kept)
        plan = plan_dispatch(choice_NK.reshape(-1), row_C, len(small))
        copies_CD = gather_rows(rows_ND, plan)
        out_CD = two_layers(copies_CD, plan, shared, small, self.activation())
        weights_C = out_CD.new_ones(len(row_C))
        return combine_rows(out_CD, weights_C, plan, len(rows_ND), self.kept)

    def params_used(self, visible, choices):
        kept = self.ffn_dim * self.kept // self.num_small
        used = kept * (2 * self.embed_dim + 1) + self.embed_dim
        if not self.keeps_all:
            if self.options.moefy_select == "oracle":  # computes the first layer to choose
                used += self.ffn_dim * (self.embed_dim + 1)
            shapes = router_shapes(self.options.moefy_select, self.num_small, self.embed_dim)
            used += sum(map(math.prod, shapes.values()))
        return choices * used

    def hidden_dim(self):
        if self.keeps_all:
            return self.ffn_dim
        # with gradients, there is an input and an output for each small expert of a row
        return self.kept * (self.ffn_dim // self.num_small + 2 * self.embed_dim)


@dataclass(frozen=True)
class SharedMoefied:
    """The weights of all small experts of a block. With ``fc1``, ``fc2``, ``grouped`` and ``waits``
    it is the :class:`~fairseq_smoe.moe.expert_kinds.ffn.SharedExperts` of a block with E * P
    experts.

    Attributes:
        small: :class:`~fairseq_smoe.moe.small_experts.SmallExperts`
        bias_ED: biases of the second layer, which belong to no small expert.
        routers: parameters of the routers, each stacked over E.
        experts: the :class:`MoefiedExperts`.
    """

    small: SmallExperts
    bias_ED: torch.Tensor
    routers: list
    experts: MoefiedExperts

    waits = True

    @cached_property
    def fc1(self):
        return SharedWeight(self.small.fc1_weight_PWD.transpose(1, 2), self.small.fc1_bias_PW)

    @cached_property
    def fc2(self):
        none_1D = self.bias_ED.new_zeros(1, self.bias_ED.shape[1])
        weight_PWD = self.small.fc2_weight_PWD
        return SharedWeight(weight_PWD, none_1D.expand(len(weight_PWD), -1))

    @cached_property
    def grouped(self):
        return self.experts.multiplies_in_groups(self.small.fc1_weight_PWD.transpose(1, 2))
