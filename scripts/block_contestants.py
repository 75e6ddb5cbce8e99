"""The modules that bench_block.py compares a block with."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fairseq_smoe.moe.block import GateRecord, SMoEBlock
from fairseq_smoe.moe.dispatch import plan_dispatch


class OneHotBlock(SMoEBlock):
    """The same block, but with dispatch by one-hot einsums as in GShard (Lepikhin et al. 2021)."""

    def _visit(self, normed_TD, i, shared, here_T=None, key_T=None):
        visible, gate = self.visible[i], self.gates[i]
        choices = gate(normed_TD)
        capacity = gate.capacity(len(normed_TD))
        plan = plan_dispatch(choices.expert_C, choices.token_C, len(visible), capacity)
        shape = gate.top_k, len(normed_TD)
        experts_KT = choices.expert_C.view(shape)
        weights_KT = gate.weights(choices, plan.kept_C).view(shape)

        combine_TEC = 0
        taken_E = torch.zeros(len(visible), dtype=torch.long)
        for k in range(len(experts_KT)):
            chosen_TE = F.one_hot(experts_KT[k], len(visible))
            place_T = ((chosen_TE.cumsum(0) - 1 + taken_E) * chosen_TE).sum(1)
            taken_E = taken_E + chosen_TE.sum(0)
            place_TC = F.one_hot(place_T.clamp(max=capacity - 1), capacity).to(weights_KT)
            weight_TE = weights_KT[k].unsqueeze(1) * chosen_TE
            combine_TEC = combine_TEC + torch.einsum("te,tc->tec", weight_TE, place_TC)
        rows_ECD = torch.einsum("tec,td->ecd", combine_TEC.bool().to(normed_TD), normed_TD)
        outputs = [
            torch.addmm(b2, torch.relu(torch.addmm(b1, rows, w1)), w2)
            for rows, w1, b1, w2, b2 in zip(
                rows_ECD, *(p[visible.start :] for p in self.experts.parameters())
            )
        ]
        y_TD = torch.einsum("tec,ecd->td", combine_TEC, torch.stack(outputs))
        return y_TD, GateRecord.of(choices, plan.kept_C), gate.losses(choices)


class DenseFFN(nn.Module):
    """x + FFN(LN(x))"""

    def __init__(self, embed_dim, ffn_dim):
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.fc1 = nn.Linear(embed_dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, embed_dim)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class FairscaleFFN(nn.Module):
    """x + MOELayer(LN(x)). The number of tokens has to be a multiple of the number of experts."""

    def __init__(self, embed_dim, ffn_dim, num_experts):
        super().__init__()
        from fairscale.nn.moe import MOELayer, Top2Gate

        self.norm = nn.LayerNorm(embed_dim)
        experts = nn.ModuleList(
            nn.Sequential(nn.Linear(embed_dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, embed_dim))
            for _ in range(num_experts)
        )
        self.moe = MOELayer(Top2Gate(embed_dim, num_experts), experts, group=dist.group.WORLD)

    def forward(self, x):
        return x + self.moe(self.norm(x).unsqueeze(1)).squeeze(1)


class ExpertProducts:
    """The matrix products of a block's experts in one step, forward and backward, and nothing else.

    Its time is that of a loop over the experts if everything else took no time. It would be less
    than that of a dense FFN over as many rows only if products of few rows were as fast as large
    ones.

    Args:
        block: has the parameters to multiply with.
        stats: of a step of the block, for the number of rows of each expert in each pass.
    """

    def __init__(self, block, stats):
        self.w1_EDF, self.w2_EFD = block.experts.fc1_weight.data, block.experts.fc2_weight.data
        self.grad1_EDF, self.grad2_EFD = map(torch.empty_like, (self.w1_EDF, self.w2_EFD))
        self.runs = [
            (visible.start + e, rows)
            for gate, visible in zip(stats.gates, block.visible)
            for e, rows in enumerate(kept_choices(gate).bincount(minlength=len(visible)).tolist())
            if rows
        ]
        most = max(rows for _, rows in self.runs)
        self.rows_MD = torch.randn(most, self.w1_EDF.shape[1]).to(self.w1_EDF)

    @torch.no_grad()
    def __call__(self):
        hidden = []
        for e, rows in self.runs:
            hidden.append(self.rows_MD[:rows].mm(self.w1_EDF[e]))
            hidden[-1].mm(self.w2_EFD[e])
        begun = set()
        for (e, rows), hidden_MF in zip(reversed(self.runs), reversed(hidden)):
            x_MD = grad_MD = self.rows_MD[:rows]
            grad_MF = grad_MD.mm(self.w2_EFD[e].t())
            grad_MF.mm(self.w1_EDF[e].t())
            beta = int(e in begun)  # later passes add to the weights' gradients
            begun.add(e)
            self.grad2_EFD[e].addmm_(hidden_MF.t(), grad_MD, beta=beta)
            self.grad1_EDF[e].addmm_(x_MD.t(), grad_MF, beta=beta)


def kept_choices(gate):
    """The expert of each token-expert pair in a :class:`GateRecord` that was computed."""
    kept_C = torch.ones_like(gate.expert_C, dtype=torch.bool)
    for condition in (gate.kept_C, gate.here_C):
        if condition is not None:
            kept_C &= condition
    return gate.expert_C[kept_C]
