"""DynMoE: the gate ``top-any``, and experts that come and go."""

from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import systems_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe import doors
from fairseq_smoe.moe.arrangements.stacking import StackedMoEBlock
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.gates.top_any import TopAnyGate, TopAnyOptions
from fairseq_smoe.moe.pool import change_experts, decide
from fairseq_smoe.moe.strata import own_experts

D, F = 8, 12  # rows of grouped_mm have at least 16 bytes
OPTIONS = TopAnyOptions(dyn_efficiency=0.1, dyn_load_balance=0.2)


def make(strata, seed=0, alive=None, dtype=torch.float64, block_class=SMoEBlock, **options):
    """A block whose parameters are all moved away from where they begin."""
    torch.manual_seed(seed)
    make_gate = partial(TopAnyGate, options=OPTIONS)
    block = block_class(D, F, strata, make_gate=make_gate, alive=alive, **options).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return block


def set_thresholds(block, value):
    with torch.no_grad():
        for gate in block.gates:
            gate.threshold.fill_(value)


def set_alive(block, alive):
    for gate, seen in zip(block.gates, block.visible):
        gate.alive_E.copy_(torch.tensor(alive[seen.start :]))


def tokens(number, dtype=torch.float64):
    return torch.randn(number, D, dtype=dtype)


# --------------------------------------------------------------------------------------
# the equations


@st.composite
def layouts(draw):
    """Sizes of the strata, and which experts live: at least one of each stratum."""
    strata = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    alive = []
    for size in strata:
        places = st.lists(st.booleans(), min_size=size, max_size=size).filter(any)
        alive += draw(places)
    return strata, alive


@settings(deadline=None, max_examples=80)
@given(
    layout=layouts(),
    padding=st.lists(st.booleans(), min_size=1, max_size=9),
    threshold=st.sampled_from([-2.0, -0.3, 0.0, 0.3, 2.0]),
    training=st.booleans(),
    grouped=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(layout, padding, threshold, training, grouped, seed):
    strata, alive = layout
    dtype, tolerance = (torch.float32, 3e-5) if grouped else (torch.float64, 1e-9)
    backend = "grouped_mm" if grouped else "loop"
    block = make(strata, seed, dtype=dtype, expert_backend=backend).train(training)
    set_alive(block, alive)
    with torch.no_grad():
        for gate in block.gates:
            gate.threshold.add_(threshold)
    x = tokens(len(padding), dtype).requires_grad_()
    real = [i for i, is_padding in enumerate(padding) if not is_padding]
    y, stats = block(x, torch.tensor(padding))
    expected = Expected(block, x[real])
    torch.testing.assert_close(y[real], expected.out, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[padding], x[padding])
    assert stats.passes[real].tolist() == expected.passes
    assert sum(int(gate.num_visits) for gate in stats.gates) == sum(expected.visits)
    assert stats.losses.keys() == expected.losses.keys() == set(block.gates[0].loss_weights)
    cotangent = torch.randn_like(x)
    wrt = [x, *block.parameters()]
    ours = torch.autograd.grad((y * cotangent).sum() + sum(stats.losses.values()), wrt)
    theirs = torch.autograd.grad(
        (expected.out * cotangent[real]).sum()
        + (x * cotangent)[padding].sum()
        + sum(expected.losses.values()),
        wrt,
        allow_unused=True,
    )
    for name, loss in stats.losses.items():
        torch.testing.assert_close(
            loss,
            torch.as_tensor(expected.losses[name], dtype=dtype),
            rtol=tolerance,
            atol=tolerance,
        )
    for own, wanted in zip(ours, theirs):
        wanted = torch.zeros_like(own) if wanted is None else wanted
        torch.testing.assert_close(own, wanted, rtol=10 * tolerance, atol=10 * tolerance)


class Expected:
    def __init__(self, block, real):
        apply = partial(reference.ffn, block.experts)
        if len(real):
            found = reference.run(block, real, reference.top_any(block), apply)
            self.out, self.passes, self.visits = found.out, found.passes, found.visits
            at_gate = found.at_gate
        else:
            self.out, self.passes, self.visits = real, [], []
            at_gate = [[] for _ in block.strata]
        by_gate = [reference.top_any_losses(g, own) for g, own in zip(block.gates, at_gate)]
        self.losses = {n: sum(of[n] for of in by_gate) / len(by_gate) for n in by_gate[0]}


@given(layout=layouts(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_low_thresholds_take_the_mean_of_all_live_experts(layout, seed):
    strata, alive = layout
    block = make(strata, seed)
    set_alive(block, alive)
    set_thresholds(block, -1.01)
    x = tokens(5)
    _, stats = block(x)
    h = block.norms[0](x)
    outputs = [reference.ffn(block.experts, e, h) for e, live in enumerate(alive) if live]
    first = SMoEBlock._visit(block, h, 0, block.experts.share(x.dtype))[0]
    torch.testing.assert_close(first, sum(outputs) / len(outputs), rtol=1e-12, atol=1e-12)
    assert int(stats.gates[0].num_visits) == 5 * sum(alive)


@given(layout=layouts(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_high_thresholds_take_none_in_training_and_the_best_in_evaluation(layout, seed):
    strata, alive = layout
    block = make(strata, seed)
    set_alive(block, alive)
    set_thresholds(block, 1.01)
    x = tokens(5)
    y, stats = block(x)
    assert torch.equal(y, x)
    assert stats.passes.tolist() == [len(strata)] * 5  # one stratum after the other
    block.eval()
    _, stats = block(x)
    for i, gate in enumerate(stats.gates):
        assert gate.expert_C.tolist() == gate.best_T.tolist()
        margins = [reference.top_any_margins(block.gates[i], h) for h in _at_gate(block, x, i)]
        live = [e for e, on in enumerate(block.gates[i].alive_E) if on]
        assert gate.best_T.tolist() == [max(live, key=lambda e: m[e]) for m in margins]
    weights = block.gates[0].weights(block.gates[0](block.norms[0](x)))
    assert torch.equal(weights, torch.ones_like(weights))


def _at_gate(block, x, i):
    return reference.run(
        block, x, reference.top_any(block), partial(reference.ffn, block.experts)
    ).at_gate[i]


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_that_is_not_alive_is_never_chosen_nor_trained(training):
    block = make((3, 2)).train(training)
    set_alive(block, [True, False, True, True, False])
    with torch.no_grad():
        for gate in block.gates:
            gate.threshold[~gate.alive_E] = -torch.inf
    y, stats = block(tokens(40))
    assert not {1, 4} & set(stats.gates[0].expert_C.tolist() + stats.gates[0].best_T.tolist())
    (y.square().sum() + sum(stats.losses.values())).backward()
    for gate in block.gates:
        for gradient in (gate.weight.grad, gate.threshold.grad):
            assert not gradient[~gate.alive_E].any() and gradient[gate.alive_E].any()


@pytest.mark.parametrize(
    "loss, reaches",
    [("translation", "active"), ("moe_gate_loss", "served"), ("gate_efficiency", "all")],
)
def test_which_activations_a_loss_reaches(loss, reaches, monkeypatch):
    """Without output the translation loss has no gradient; but the losses of activations have."""
    block = make((3,))
    margins_TE = torch.randn(9, 3, dtype=torch.float64)
    margins_TE[0] = -margins_TE[0].abs()
    monkeypatch.setattr(block.gates[0], "_margins", lambda _: margins_TE.requires_grad_())
    y, stats = block(tokens(9))
    (gradient,) = torch.autograd.grad(
        y.square().sum() if loss == "translation" else stats.losses[loss], margins_TE
    )
    expected = {
        "active": margins_TE > 0,
        "served": (margins_TE > 0).any(dim=1, keepdim=True).expand(9, 3),
        "all": torch.ones(9, 3, dtype=torch.bool),
    }
    assert torch.equal(gradient != 0, expected[reaches])


@given(layout=layouts(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_evaluation_does_not_depend_on_the_batch(layout, seed):
    strata, alive = layout
    block = make(strata, seed).eval()
    set_alive(block, alive)
    x = tokens(7)
    y, _ = block(x)
    order = torch.randperm(7)
    torch.testing.assert_close(block(x[order])[0], y[order], rtol=1e-13, atol=1e-13)
    alone = torch.cat([block(token.view(1, D))[0] for token in x])
    torch.testing.assert_close(alone, y, rtol=1e-13, atol=1e-13)
    assert torch.equal(block(x)[0], y)


def test_half_precision_decides_in_full_precision():
    block = make((4, 4), dtype=torch.float32)
    x = tokens(30, torch.float32)
    half = make((4, 4), dtype=torch.float32).bfloat16()
    records = half(x.bfloat16())[1].gates
    assert records[0].scores_TE.dtype == torch.float32
    assert half.gates[0].counts.dtype == torch.int64 and half.gates[0].alive_E.dtype == torch.bool
    with torch.autocast("cpu", torch.bfloat16):
        stats = block(x)[1]
    exact = block(x)[1]
    assert torch.equal(stats.gates[0].expert_C, exact.gates[0].expert_C)
    for name in ("gate_diversity", "gate_simplicity"):
        assert torch.equal(stats.losses[name], exact.losses[name])


# --------------------------------------------------------------------------------------
# accounting


def test_initial_vectors_make_half_of_the_experts_active():
    torch.manual_seed(0)
    gate = TopAnyGate(64, 6).eval()
    choices = gate(torch.randn(20000, 64))
    assert gate.expected_choices() == 3 + 1 / 64
    assert len(choices.expert_C) / 20000 == pytest.approx(gate.expected_choices(), abs=0.03)


def test_accounting_counts_live_experts():
    with torch.device("meta"):
        block = SMoEBlock(D, F, (4, 6), make_gate=TopAnyGate, alive=(2, 3))
    assert block.num_alive() == [2, 3]
    assert block.expected_visits() == [1, 0.4]
    assert block.expected_choices() == [2.5 + 2**-5, 1.5 + 2**-3]
    stacked = make((2, 3), alive=(1, 2), block_class=StackedMoEBlock)
    assert stacked.num_alive() == [1, 2]
    assert stacked.expected_choices() == [0.5 + 0.5, 1 + 0.25]


# --------------------------------------------------------------------------------------
# experts that come and go


@given(layout=layouts(), data=st.data())
@settings(deadline=None, max_examples=200)
def test_rules(layout, data):
    strata, alive = layout
    visits = [data.draw(st.integers(0, 2)) if on else 0 for on in alive]
    unserved = [data.draw(st.booleans()) for _ in strata]
    gone, new = decide(alive, strata, visits, unserved)
    after = [(on and e not in gone) or e in new.values() for e, on in enumerate(alive)]
    for i, own in enumerate(own_experts(strata)):
        assert any(after[e] for e in own)
        assert (i in new) == (unserved[i] and not all(alive[e] for e in own))
        if i in new:
            assert new[i] == min(e for e in own if not alive[e])
        for e in own:
            if alive[e] and visits[e]:
                assert after[e]
            elif alive[e] and after[e]:  # unused, but the last one
                assert e not in gone and sum(after[e] for e in own) == 1


def count(block, *batches):
    """What the gates count in some batches of training."""
    for gate in block.gates:
        gate.recording = True
    for batch in batches:
        for gate, record in zip(block.gates, block(*batch)[1].gates):
            gate.counts += record.counts


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_counts(backend):
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    block = make((3, 2), dtype=dtype, expert_backend=backend)
    set_thresholds(block, 0.2)
    x, padding = tokens(20, dtype), torch.arange(20) % 5 == 4
    count(block, (x, padding))
    found = reference.run(
        block, x[~padding], reference.top_any(block), partial(reference.ffn, block.experts)
    )
    for gate, seen, at_gate, chosen in zip(block.gates, block.visible, found.at_gate, found.chosen):
        num_tokens, visits_E, unserved_D = gate.counted
        assert num_tokens == len(at_gate)
        assert visits_E.tolist() == [sum(e in weights for weights in chosen) for e in seen]
        unserved = [h for h, weights in zip(at_gate, chosen) if not weights]
        torch.testing.assert_close(
            unserved_D, sum(unserved, torch.zeros(D)).double(), rtol=1e-5, atol=1e-5
        )
        assert unserved


def test_counts_do_not_depend_on_how_tokens_are_spread():
    block = make((3, 2))
    x = tokens(30)
    count(block, (x,))
    together = [gate.counts.clone() for gate in block.gates]
    for gate in block.gates:
        gate.counts.zero_()
    count(block, (x[7:],), (x[:7],), (tokens(3), torch.ones(3, dtype=torch.bool)))
    assert all(torch.equal(gate.counts, of_gate) for gate, of_gate in zip(block.gates, together))


def test_nothing_is_counted_in_evaluation_or_when_not_asked():
    block = make((2, 2))
    assert block(tokens(3))[1].gates[0].counts is None
    block.gates[0].recording = True
    assert block.eval()(tokens(3))[1].gates[0].counts is None


def set_counts(gate, visits, unserved):
    counts = [1, *visits, *(round(u * 2**24) for u in unserved)]
    gate.counts.copy_(torch.tensor(counts))


def test_one_change_from_known_counts():
    block = make((3, 2), alive=(2, 2))
    gates = block.gates
    direction = [3.0, -4.0, *[0.0] * (D - 2)]
    set_counts(gates[0], [5, 0, 0, 0, 0], direction)  # expert 1 goes, 2 comes; 3 goes
    set_counts(gates[1], [0, 7], [1.0] * D)  # 4 stays; no room for another
    before = {name: value.clone() for name, value in block.state_dict().items()}
    rows = change_experts(block)
    assert gates[0].alive_E.tolist() == [True, False, True, False, True]
    assert gates[1].alive_E.tolist() == [False, True]
    (vector, threshold, *of_expert) = rows
    assert vector.parameter is gates[0].weight and vector.row == threshold.row == 2
    assert vector.value.tolist() == [0.6, -0.8, *[0.0] * (D - 2)]
    assert threshold.parameter is gates[0].threshold and threshold.value == 0
    assert [row.parameter for row in of_expert] == list(block.experts.parameters())
    assert all(row.row == 2 and row.value is None for row in of_expert)
    for name, value in block.state_dict().items():
        if name.endswith("counts"):
            assert not value.any()
        elif not name.endswith("alive_E"):
            assert torch.equal(value, before[name])
    # room that has become free is used at the next change
    set_counts(gates[0], [5, 0, 5, 0, 5], direction)
    set_counts(gates[1], [0, 7], direction)
    rows = change_experts(block)
    assert gates[0].alive_E.tolist() == [True, True, True, True, True]
    assert gates[1].alive_E.tolist() == [True, True]
    of_gates = [(row.row, row.value) for row in rows if row.parameter in {g.weight for g in gates}]
    assert [row for row, _ in of_gates] == [1, 3, 0]  # expert 3 is the first that gate 1 sees
    assert all(value.norm() == 1 for _, value in of_gates)


def test_without_tokens_nothing_changes():
    block = make((2, 2))
    assert change_experts(block) == []
    assert all(gate.alive_E.all() for gate in block.gates)


def test_intervals():
    options = replace(OPTIONS, dyn_update_interval=10, dyn_record_interval=3)
    gate = TopAnyGate(D, 4, options)
    assert [n for n in range(1, 22) if gate.records(n)] == [8, 9, 10, 18, 19, 20]
    never = TopAnyGate(D, 4, replace(options, dyn_update_interval=0))
    assert not any(never.records(n) for n in range(1, 22))
    block = SMoEBlock(D, F, (2, 2), make_gate=partial(TopAnyGate, options=options))
    for gate in block.gates:
        gate.counts[0] = 1
    for update, alive in ((9, [2, 2]), (10, [1, 1])):  # nobody has visited any
        assert TopAnyGate.after_update(block, update) == []
        assert block.num_alive() == alive


# --------------------------------------------------------------------------------------
# options


def model_options(**changes):
    options = {
        "smoe_norm": "paper",
        "moe_eom": 0.0,
        "moe_gate": "top-any",
        "moe_experts": "ffn",
        "moe_arrangement": None,
    }
    for flag in doors.DOORS:
        for kind in doors.named_kinds(flag).values():
            options |= vars(kind.Options())
    return Namespace(**{**options, **changes})


def test_the_pool_is_larger_than_the_strata_at_the_start():
    block = doors.build_sublayer(D, F, model_options(moe_max_experts=4), (2, 3))
    assert block.strata == (4, 4) and block.num_alive() == [2, 3]
    assert block.gates[0].alive_E.tolist() == [True] * 2 + [False] * 2 + [True] * 3 + [False]
    assert block.gates[1].alive_E.tolist() == [True] * 3 + [False]
    assert len(block.experts.fc1_weight) == 8
    block = doors.build_sublayer(D, F, model_options(), (2, 3))
    assert block.strata == (2, 3) and block.num_alive() == [2, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moe_max_experts": 3}, "--moe-max-experts 3: expected at least 4, as --smoe-strata 2-4"),
        (
            {"moe_max_experts": 8, "moe_gate": "top-k"},
            "--moe-max-experts 8: needs --moe-gate top-any",
        ),
        ({"dyn_update_interval": -1}, "--dyn-update-interval -1: expected 0"),
        (
            {"dyn_update_interval": 10, "dyn_record_interval": 11},
            "--dyn-record-interval 11: expected 1 or more, up to --dyn-update-interval 10",
        ),
        ({"dyn_record_interval": 0}, "--dyn-record-interval 0: expected 1 or more"),
        ({"dyn_aux": -0.1}, "--dyn-aux -0.1: expected 0 or more"),
        ({"dyn_load_balance": -1.0}, "--dyn-load-balance -1.0: expected 0 or more"),
        ({"moe_top1_expert": True}, "--moe-top1-expert with --moe-gate top-any"),
        ({"moe_capacity_factor": 1.0}, "--moe-capacity-factor 1.0 with --moe-gate top-any"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(OptionError) as error:
        doors.check_kinds(model_options(**changes), (2, 4))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
