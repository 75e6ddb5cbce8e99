"""Gates, kinds of experts and arrangements other than the paper's, in a block."""

from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe import doors
from fairseq_smoe.moe.arrangement import Arrangement
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.expert_kinds.ffn import FFNExperts
from fairseq_smoe.moe.experts import Experts
from fairseq_smoe.moe.gate import Choices, Gate
from fairseq_smoe.moe.gates.top_k import TopKGate
from fairseq_smoe.moe.kind import KindOptions, option
from fairseq_smoe.moe.routing import mean_over

D = 6


@dataclass
class AboveOptions(KindOptions):
    above: float = option(0.2, "probability from which an expert is visited")


class AboveGate(Gate):
    """Visits the experts above a probability: none, some or all; names a loss of its own."""

    Options = AboveOptions

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_weights = {"peak": 0.5}

    def forward(self, tokens_TD, here_T=None):
        scores_TE = self.logits(tokens_TD).softmax(dim=1)
        return Choices.where(scores_TE, scores_TE > self.options.above)

    def losses(self, choices, here_T=None):
        return {
            **super().losses(choices, here_T),
            "peak": mean_over(choices.scores_TE.amax(dim=1), here_T),
        }


class ScalingExperts(Experts):
    """Each expert multiplies by a vector of its own; counts the rows that it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_stacked("scale", torch.randn(sum(self.strata), self.embed_dim))
        self.num_rows = []

    def share(self, dtype):
        return Namespace(waits=True)

    def multiply(self, rows_ND, runs, shared, experts):
        self.num_rows.append(sum(runs.rows_per_expert))
        (scale_ED,) = self.stacked()
        own_ED = scale_ED[experts.start : experts.stop]
        return rows_ND * own_ED.repeat_interleave(torch.tensor(runs.rows_per_expert), 0)


def make(strata, above, seed=0, **options):
    torch.manual_seed(seed)
    return SMoEBlock(
        D,
        5,
        strata,
        make_gate=lambda dim, experts: AboveGate(dim, experts, AboveOptions(above)),
        make_experts=ScalingExperts,
        **options,
    ).double()


def reference(block, x, above):
    """Token by token, expert by expert: output, passes, number of rows."""
    rows, out, passes = 0, [], []
    for token in x:
        stratum = 0
        steps = 0
        while stratum < len(block.strata):
            first = sum(block.strata[:stratum])
            h = block.norms[stratum](token)
            probs = (block.gates[stratum].weight @ h).softmax(0)
            for e, prob in enumerate(probs):
                if prob > above:
                    token = token + prob * h * block.experts.scale[first + e]
                    rows += 1
            best = first + int(probs.argmax())
            stratum = 1 + next(
                i for i in range(len(block.strata)) if best < sum(block.strata[: i + 1])
            )
            steps += 1
        out.append(token)
        passes.append(steps)
    return torch.stack(out), passes, rows


@settings(deadline=None, max_examples=60)
@given(
    strata=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    above=st.sampled_from([0.0, 0.15, 0.3, 0.6, 1.0]),
    tokens=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_any_number_of_experts_a_token(strata, above, tokens, seed):
    block = make(strata, above, seed)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    y, stats = block(x)
    expected, passes, rows = reference(block, x, above)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert stats.passes.tolist() == passes
    assert sum(block.experts.num_rows) == rows  # none for a choice that was not made
    weights = [x, *block.parameters()]
    target = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad((y * target).sum(), weights, allow_unused=True),
        torch.autograd.grad((expected * target).sum(), weights, allow_unused=True),
    ):
        zeros = torch.zeros(())
        ours = zeros if ours is None else ours
        theirs = zeros if theirs is None else theirs
        torch.testing.assert_close(
            *torch.broadcast_tensors(ours, theirs), rtol=1e-9, atol=1e-9, check_dtype=False
        )


def test_a_token_without_experts_moves_on_unchanged():
    block = make((2, 2), above=1.0)
    x = torch.randn(9, D, dtype=torch.float64)
    y, stats = block(x)
    assert torch.equal(y, x)
    assert stats.passes.min() >= 1
    assert block.experts.num_rows == [0] * len(block.experts.num_rows)


def test_padding_is_not_routed_by_any_gate():
    block = make((2, 2), above=0.0)
    x = torch.randn(9, D, dtype=torch.float64)
    mask = torch.arange(9) >= 6
    y, stats = block(x, mask)
    torch.testing.assert_close(y[:6], block(x[:6])[0])
    assert torch.equal(y[6:], x[6:]) and not stats.passes[6:].any()


def test_losses_by_name_are_means_over_the_gates():
    block = make((2, 3), above=0.1)
    _, stats = block(torch.randn(20, D, dtype=torch.float64))
    assert set(stats.losses) == {"moe_gate_loss", "peak"}
    assert stats.loss_weights == {"peak": 0.5}
    expected = sum(gate.scores_TE.amax(dim=1).mean() for gate in stats.gates) / 2
    torch.testing.assert_close(stats.losses["peak"], expected)


def test_choices_in_any_order_of_experts_stand_with_the_best_first():
    scores_TE = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.3, 0.2]])
    choices = Choices.where(scores_TE, scores_TE > 0.15)
    assert choices.best_T.tolist() == [1, 0]
    pairs = list(zip(choices.token_C.tolist(), choices.expert_C.tolist()))
    assert set(pairs[:2]) == {(0, 1), (1, 0)}
    assert pairs[2:] == [(0, 2), (1, 1), (1, 2)]


def test_flops_count_what_even_gates_choose():
    assert AboveGate(D, 4, AboveOptions(0.2)).expected_choices() == 4
    assert AboveGate(D, 4, AboveOptions(0.5)).expected_choices() == 0
    with torch.device("meta"):
        block = SMoEBlock(D, 5, (4, 1))
    assert [gate.expected_choices() for gate in block.gates] == [2, 1]


# --------------------------------------------------------------------------------------
# by name


class Twice(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, padding_mask=None):
        y, _ = self.block(x, padding_mask)
        return self.block(y, padding_mask)


class Repeat(Arrangement):
    @classmethod
    def arrange(cls, make_block, embed_dim, ffn_dim, options, **ffn_options):
        return Twice(make_block(embed_dim, ffn_dim))


def model_options(**changes):
    options = {
        "smoe_norm": "paper",
        "moe_eom": 0.0,
        "moe_gate": "top-k",
        "moe_experts": "ffn",
        "moe_arrangement": None,
    }
    kinds = [kind for flag in doors.DOORS for kind in doors.named_kinds(flag).values()]
    for kind in kinds:
        options |= vars(kind.Options())
    return Namespace(**{**options, "above": 0.2, **changes})


def build(**changes):
    torch.manual_seed(0)
    return doors.build_sublayer(D, 5, model_options(**changes), (2, 2))


def test_what_the_project_has():
    assert {flag: list(doors.named_kinds(flag)) for flag in doors.DOORS} == {
        "--moe-gate": ["threshold", "top-any", "top-k"],
        "--moe-experts": ["adapter", "ffn", "moefied", "sized", "tensor-product"],
        "--moe-arrangement": ["cmr", "multi-head", "stacking"],
    }


def test_own_kinds_by_module_and_class():
    block = build(moe_gate=f"{__name__}:AboveGate", moe_experts=f"{__name__}:ScalingExperts")
    assert {type(gate) for gate in block.gates} == {AboveGate}
    assert isinstance(block.experts, ScalingExperts)
    assert isinstance(build().experts, FFNExperts)


def test_a_kind_derived_from_one_of_the_project_does_not_take_its_place():
    class Derived(TopKGate):
        pass

    assert doors.find_kind("--moe-gate", "top-k") is TopKGate
    assert Derived in doors.all_kinds()


def test_arrangements_by_name_and_by_flag_are_the_same():
    for name, flag in (("cmr", "moe_cmr"), ("stacking", "smoe_stacking")):
        by_name, by_flag = build(moe_arrangement=name), build(**{flag: True})
        assert str(by_name) == str(by_flag) != str(build())


def test_arrangements_hold_each_other():
    sublayer = build(moe_cmr=True, moe_arrangement=f"{__name__}:Repeat")
    assert isinstance(sublayer, Twice) and hasattr(sublayer.block, "cmr_gate")
    y, stats = sublayer(torch.randn(3, D))
    assert y.shape == (3, D) and stats.passes.shape == (3,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_gate": "no_module_of_this_name:Gate"}, "add --moe-modules no_module_of_this_name"),
        ({"moe_gate": f"{__name__}:Missing"}, "has no class Missing that is a Gate"),
        ({"moe_gate": f"{__name__}:ScalingExperts"}, "has no class ScalingExperts that is a Gate"),
        (
            {"moe_experts": "fnn"},
            "--moe-experts fnn: expected adapter or .*, or module:Class",
        ),
        ({"moe_arrangement": "cmr,os:path"}, "os has no class path that is a Arrangement"),
    ],
)
def test_wrong_names(changes, message):
    with pytest.raises(OptionError, match=message):
        build(**changes)
