"""Tokens that visit a single expert at every gate, beside others in the same batch, against the
token-by-token reference."""

import pytest
import systems_reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems_reference import adapter, ffn, shared_ffn, sized_ffn, tensor_product, top_any_margins
from test_doors import model_options

from fairseq_smoe.moe import doors
from fairseq_smoe.moe.single_expert import STRONG, SingleExpert, scrambled, viewed

D, F = 8, 8
EXACT = {"rtol": 0, "atol": 1e-12}  # products of another number of rows may be rounded otherwise
STRATA = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
GATES = {
    "top-k": {},
    "switch": {"moe_top1_expert": True},
    "threshold": {"moe_gate": "threshold", "moe_threshold": "0.6"},
    "top-any": {"moe_gate": "top-any"},
}
KINDS = {
    "ffn": {},
    "grouped": {"moe_expert_backend": "grouped_mm"},
    "sized": {"moe_experts": "sized"},
    "tensor-product": {"moe_experts": "tensor-product"},
    "adapter": {"moe_experts": "adapter", "pesc_adapter_dim": 8},
}


def build(strata=(2, 3), seed=0, dtype=torch.float64, **options):
    """A sublayer with random parameters, gates well apart."""
    torch.manual_seed(seed)
    sublayer = doors.build_sublayer(D, F, model_options(**options), strata).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in sublayer.named_parameters():
            if "experts" not in name or "up_weight" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return sublayer


def routed_block(sublayer):
    while hasattr(sublayer, "block"):
        sublayer = sublayer.block
    return sublayer


def inputs(rows, length=3, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, D, generator=generator, dtype=torch.float64).to(dtype)


def keys_of(weak, x):
    """Keys of the rows that ``weak`` marks."""
    return torch.where(weak, 7, STRONG).unsqueeze(1).expand(x.shape[:2])


def run(sublayer, x, keys, rank, padding=None):
    with torch.no_grad(), viewed([routed_block(sublayer)], SingleExpert(rank), keys):
        return sublayer(x, padding)


def k_th(block, rank):
    """``choose`` of the reference: the k-th best live expert that the gate sees, or the last."""

    def choose(i, h):
        gate, first = block.gates[i], block.visible[i].start
        values = gate.weight @ h
        if gate.alive_E is not None:
            values = top_any_margins(gate, h)
        alive = range(len(values)) if gate.alive_E is None else gate.alive_E.nonzero().flatten()
        ranked = sorted(map(int, alive), key=lambda e: -float(values[e]))
        expert = first + ranked[min(rank, len(ranked)) - 1]
        return {expert: 1.0}, expert

    return choose


def apply_of(block):
    """``apply`` and ``leave`` of the reference."""
    experts = block.experts
    name = type(experts).name
    if name == "sized":
        return lambda e, h: sized_ffn(experts, experts.widths, e, h), None
    if name == "tensor-product":
        return lambda e, h: tensor_product(experts, e, h), None
    if name == "adapter":
        return lambda e, h: adapter(experts, e, h), lambda h: shared_ffn(experts, h)
    return lambda e, h: ffn(experts, e, h), None


def reference(block, tokens, rank):
    apply, leave = apply_of(block)
    with torch.no_grad():
        return systems_reference.run(block, tokens, k_th(block, rank), apply, leave)


# --------------------------------------------------------------------------------------
# the k-th best expert


@settings(deadline=None, max_examples=40)
@given(
    strata=STRATA,
    gate=st.sampled_from(sorted(GATES)),
    rank=st.integers(1, 9),
    weak=st.lists(st.booleans(), min_size=1, max_size=5).map(torch.tensor),
    seed=st.integers(0, 1000),
)
def test_weak_rows_visit_the_k_th_expert_and_others_what_they_would(strata, gate, rank, weak, seed):
    """The last one where a gate sees fewer; its weight is 1, its stratum decides the next gate."""
    block = build(strata, seed, **GATES[gate])
    x = inputs(len(weak), seed=seed)
    padding = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.2
    with torch.no_grad():
        plain, stats = block(x, padding)
    y, mixed = run(block, x, keys_of(weak, x), rank, padding)
    torch.testing.assert_close(y[~weak], plain[~weak], **EXACT)
    assert torch.equal(y[padding], x[padding])
    assert torch.equal(mixed.passes[~weak], stats.passes[~weak])
    own = weak.unsqueeze(1) & ~padding
    expected = reference(block, x[own], rank)
    torch.testing.assert_close(y[own], expected.out, rtol=1e-9, atol=1e-9)
    assert mixed.passes[own].tolist() == expected.passes
    assert mixed.losses == {} and block.view is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strata", [(4,), (2, 2)])
def test_every_kind_of_experts(kind, strata):
    if kind == "grouped":
        tolerance, dtype = 1e-5, torch.float32
    else:
        tolerance, dtype = 1e-9, torch.float64
    block = build(strata, dtype=dtype, **KINDS[kind])
    x = inputs(6, dtype=dtype)
    weak = torch.arange(6) % 3 > 0
    with torch.no_grad():
        plain, _ = block(x)
    for rank in (1, 2, 4):
        y, _ = run(block, x, keys_of(weak, x), rank)
        torch.testing.assert_close(y[~weak], plain[~weak], rtol=tolerance, atol=tolerance)
        expected = reference(block, x[weak].flatten(0, 1), rank).out.view_as(x[weak])
        torch.testing.assert_close(y[weak], expected, rtol=tolerance, atol=tolerance)


def test_experts_that_are_not_alive_have_no_rank():
    block = build((2, 2), moe_gate="top-any", moe_max_experts=4)
    assert [gate.num_alive() for gate in block.gates] == [[2, 2], [2]]
    x = inputs(5)
    for rank in (1, 2, 3, 4, 9):
        y, _ = run(block, x, keys_of(torch.ones(5, dtype=torch.bool), x), rank)
        expected = reference(block, x.flatten(0, 1), rank).out.view_as(x)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


def test_stacking():
    """One expert of every stratum, without residual in between."""
    block = build((2, 3), smoe_stacking=True)
    x = inputs(4)
    weak = torch.tensor([True, False, True, True])
    y, stats = run(block, x, keys_of(weak, x), 2)
    with torch.no_grad():
        plain, _ = block(x)
        for row, out in zip(x[weak].flatten(0, 1), y[weak].flatten(0, 1)):
            h = block.norms[0](row)
            for gate, experts in zip(block.gates, block.visible):
                second = (gate.weight @ h).topk(2).indices[1]
                h = ffn(block.experts, experts[second], h)
            torch.testing.assert_close(out, row + h, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[~weak], plain[~weak], **EXACT)
    assert (stats.passes == 2).all()


def test_heads_are_weak_by_themselves():
    sublayer = build((2, 2), moe_heads=2, moe_ffn_dim=F)
    x = inputs(4)
    weak = torch.tensor([False, True, True, False])
    y, _ = run(sublayer, x, keys_of(weak, x), 2)
    with torch.no_grad():
        plain, _ = sublayer(x)
        tokens = x[weak].flatten(0, 1)
        expected, _ = systems_reference.multi_head(
            sublayer, tokens, lambda heads: reference(sublayer.block, heads, 2)
        )
    torch.testing.assert_close(y[weak], expected.view_as(x[weak]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y[~weak], plain[~weak], **EXACT)


def test_cmr_and_eom():
    """The dense FFN of CMR is the same in both views; EOM scales the single expert, too."""
    sublayer = build((2, 2), moe_cmr=True, moe_eom=0.25)
    block = sublayer.block
    x = inputs(3)
    y, _ = run(sublayer, x, keys_of(torch.ones(3, dtype=torch.bool), x), 1)
    with torch.no_grad():
        g = torch.sigmoid(sublayer.cmr_gate(block.norms[0](x)))
        dense = x + sublayer.fc2(sublayer.fc1(block.norms[0](x)).relu())
        tokens = x.flatten(0, 1)
        weak = systems_reference.run(
            block, tokens, k_th(block, 1), lambda e, h: 0.75 * ffn(block.experts, e, h)
        ).out.view_as(x)
    torch.testing.assert_close(y, (1 - g) * dense + g * weak, rtol=1e-9, atol=1e-9)


def test_rank_1_is_a_gate_that_takes_its_best_expert_with_weight_1():
    gate = {"moe_threshold": "0", "moe_threshold_weights": "renormalised"}
    block = build((3, 2, 2), moe_gate="threshold", **gate)
    x = inputs(7)
    with torch.no_grad():
        plain, stats = block(x)
    y, weak = run(block, x, torch.zeros(x.shape[:2], dtype=torch.long), 1)
    torch.testing.assert_close(y, plain, **EXACT)
    assert torch.equal(weak.passes, stats.passes)


def test_a_single_expert_is_the_same_in_both_views():
    block = build((1,))
    x = inputs(4)
    y, _ = run(block, x, keys_of(torch.tensor([True, False, True, False]), x), 2)
    with torch.no_grad():
        torch.testing.assert_close(y, block(x)[0], **EXACT)


def test_a_gate_of_the_users_own_is_ranked_by_its_scores():
    """What ``preferences`` is by default."""
    block = build((4,))
    default = super(type(block.gates[0]), block.gates[0]).preferences
    h = inputs(5).flatten(0, 1)
    with torch.no_grad():
        own, scores = block.gates[0].preferences(h), default(h)
    assert torch.equal(own.sort(1).indices, scores.sort(1).indices)
    torch.testing.assert_close(own.softmax(1), scores)


def test_the_view_ends_with_its_context():
    blocks = [build(), build((3,))]
    with pytest.raises(KeyError), viewed(blocks, SingleExpert(1), torch.zeros(1)):
        assert [block.view.number for block in blocks] == [0, 1]
        raise KeyError
    assert [block.view for block in blocks] == [None, None]


# --------------------------------------------------------------------------------------
# a random expert


def visited(sublayer, x, keys):
    """The expert that each token visits at each gate of a block."""
    _, stats = run(sublayer, x, keys, None)
    return [dict(zip(gate.token_C.tolist(), gate.expert_C.tolist())) for gate in stats.gates]


def test_random_experts_depend_on_the_keys_alone():
    block = build((5,))
    keys = torch.arange(2000).view(500, 4)
    x = inputs(500, 4)
    (first,) = visited(block, x, keys)
    (again,) = visited(block, torch.randn_like(x), keys)
    assert first == again and len(first) == 2000
    (reversed_,) = visited(block, x, keys.flip(0, 1))
    assert [reversed_[i] for i in range(2000)] == [first[1999 - i] for i in range(2000)]
    counts = torch.tensor(list(first.values())).bincount(minlength=5)
    assert counts.min() > 340 and counts.max() < 460  # 400 each, 3.4 standard deviations


def test_random_experts_are_independent_at_gates_blocks_and_heads():
    """About a quarter of 2000 tokens get the same one of four experts."""
    keys = torch.arange(2000).view(500, 4)
    x = inputs(500, 4)
    blocks = [build((4,)), build((4,))]
    stats = []
    with torch.no_grad(), viewed(blocks, SingleExpert(None), keys):
        stats += [block(x)[1].gates[0].expert_C for block in blocks]
    stacked = build((4, 4), smoe_stacking=True)
    stats += [gate.expert_C for gate in run(stacked, x, keys, None)[1].gates]
    for i, one in enumerate(stats):
        for j, other in enumerate(stats[:i]):
            if (i, j) != (2, 0):  # the first gate of a first block
                assert 0.2 < (one == other).double().mean() < 0.3
    assert torch.equal(stats[2], stats[0])
    heads = run(build((4,), moe_heads=2, moe_ffn_dim=F), x, keys, None)[1].gates[0]
    experts_TH = heads.expert_C.view(-1, 2)
    assert 0.2 < (experts_TH[:, 0] == experts_TH[:, 1]).double().mean() < 0.3


def test_random_experts_are_alive():
    block = build((3,), moe_gate="top-any", moe_max_experts=6)
    gate = block.gates[0]
    gate.alive_E = torch.tensor([False, True, False, True, True, False])
    keys = torch.arange(600).view(200, 3)
    (experts,) = visited(block, inputs(200), keys)
    assert set(experts.values()) == {1, 3, 4}


@settings(deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 10**6))
def test_scrambled_numbers(number, salt):
    found = scrambled(torch.tensor([number, number + 1]), salt)
    assert (found >= 0).all() and found[0] != found[1]
    assert torch.equal(found[:1], scrambled(torch.tensor([number]), salt))
    assert not torch.equal(found, scrambled(torch.tensor([number, number + 1]), salt + 1))


def test_scrambled_numbers_are_those_of_splitmix64():
    """The first numbers of the published generator for the seed 0, without their sign."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    for number, expected in enumerate(published):
        found = scrambled(torch.tensor([0]), number)
        assert int(found) == expected & (2**63 - 1)
