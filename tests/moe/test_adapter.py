"""Experts that are adapters on a shared FFN (PESC)."""

from functools import partial

import pytest
import systems_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_doors import AboveGate, AboveOptions, build, model_options
from test_expert_group import compare
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fairseq_smoe.accounting import scaling
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.doors import check_kinds
from fairseq_smoe.moe.expert_kinds.adapter import AdapterExperts, AdapterOptions

D, F, A = 8, 16, 4
ABOVE = 0.3  # probability from which AboveGate visits an expert; if none has it, it visits none


def make_experts(**options):
    return partial(AdapterExperts, options=AdapterOptions(**{"pesc_adapter_dim": A, **options}))


def make_gate(top_k):
    if top_k is not None:
        return None
    return lambda dim, experts: AboveGate(dim, experts, AboveOptions(ABOVE))


def make_block(strata=(2, 3), top_k=2, seed=0, dtype=torch.float64, **changes):
    """A block whose adapters do something; ``top_k=None`` for AboveGate. ``changes`` are options of
    the block, and of the experts where they have those names."""
    torch.manual_seed(seed)
    options = {k: changes.pop(k) for k in list(changes) if k.startswith(("pesc_", "moe_"))}
    more = {"make_gate": make_gate(top_k), "make_experts": make_experts(**options), **changes}
    block = SMoEBlock(D, F, strata, top_k or 2, **more).to(dtype)
    nn.init.normal_(block.experts.up_weight)
    return block


strata_of = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)
gates_of = st.sampled_from([1, 2, None])


def choose_above(block):
    def choose(gate, h):
        first = sum(block.strata[:gate])
        probs = (block.gates[gate].weight @ h).softmax(0)
        chosen = {first + e: p for e, p in enumerate(probs) if p > ABOVE}
        return chosen, first + int(probs.argmax())

    return choose


@settings(deadline=None, max_examples=60)
@given(
    strata=strata_of,
    top_k=gates_of,
    scale=st.sampled_from([1.0, 0.25]),
    tokens=st.integers(1, 7),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_block_is_that_of_the_equations(strata, top_k, scale, tokens, padding, seed):
    """Token by token; with AboveGate, some take no expert."""
    block = make_block(strata, top_k, seed, capacity_factor=None, pesc_scale=scale)
    x = torch.randn(tokens + padding, D, dtype=torch.float64, requires_grad=True)
    y, stats = block(x, torch.arange(len(x)) >= tokens)
    expected = reference.run(
        block,
        x[:tokens],
        reference.choose_top_k(block, top_k) if top_k else choose_above(block),
        partial(reference.adapter, block.experts),
        partial(reference.shared_ffn, block.experts),
    )
    assert torch.equal(y[tokens:], x[tokens:])
    torch.testing.assert_close(y[:tokens], expected.out, rtol=1e-9, atol=1e-9)
    assert stats.passes[:tokens].tolist() == expected.passes
    target = torch.randn_like(expected.out)
    inputs = [x, *block.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad((y[:tokens] * target).sum(), inputs, allow_unused=True),
        torch.autograd.grad((expected.out * target).sum(), inputs, allow_unused=True),
    ):
        ours = torch.zeros(()) if ours is None else ours
        theirs = torch.zeros(()) if theirs is None else theirs
        torch.testing.assert_close(
            *torch.broadcast_tensors(ours, theirs), rtol=1e-9, atol=1e-9, check_dtype=False
        )


def test_in_one_stratum_it_is_the_papers_equation():
    """The sum over two experts of R * (up(phi(down(u))) + u), with u = FFN(h) and R of sum 1."""
    block = make_block((4,)).eval()
    x = torch.randn(20, D, dtype=torch.float64)
    h, experts = block.norms[0](x), block.experts
    u = experts.ffn.fc2(experts.ffn.fc1(h).relu())
    probs = (h @ block.gates[0].weight.t()).softmax(1)
    top = probs.topk(2)
    kept = torch.zeros_like(probs).scatter(1, top.indices, top.values)
    outputs = torch.stack(
        [u + (u @ down).relu() @ up for down, up in zip(experts.down_weight, experts.up_weight)], 1
    )
    weights = kept / kept.sum(1, keepdim=True)
    expected = x + (weights.unsqueeze(2) * outputs).sum(1)
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------
# made from a dense sublayer


def from_dense(norm, fc1, fc2, strata, top_k, **options):
    """What a converter does: every LayerNorm is the dense one, the FFN is the dense one."""
    make = make_experts()
    options = {"make_gate": make_gate(top_k), "make_experts": make, **options}
    block = SMoEBlock(D, F, strata, top_k or 2, **options)
    for own in block.norms:
        own.load_state_dict(norm.state_dict())
    block.experts.ffn.load_state_dict(
        {f"{n}.{k}": v for n, m in (("fc1", fc1), ("fc2", fc2)) for k, v in m.state_dict().items()}
    )
    return block


@settings(deadline=None, max_examples=60)
@given(
    strata=strata_of,
    top_k=gates_of,
    spread=st.sampled_from([0.0, 1.0, 100.0]),
    capacity=st.sampled_from([0.3, 2.0, None]),
    training=st.booleans(),
    backend=st.sampled_from(["loop", "grouped_mm"]),
    seed=st.integers(0, 1000),
)
def test_it_starts_as_the_dense_sublayer(strata, top_k, spread, capacity, training, backend, seed):
    """For any gates, also where experts are full."""
    torch.manual_seed(seed)
    norm, fc1, fc2 = nn.LayerNorm(D), nn.Linear(D, F), nn.Linear(F, D)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    block = from_dense(norm, fc1, fc2, strata, top_k, capacity_factor=capacity)
    block.experts.options.moe_expert_backend = backend
    for gate in block.gates:
        nn.init.normal_(gate.weight, std=spread)
    x = torch.randn(21, D)
    padding = torch.arange(21) >= 18
    y, _ = block.train(training)(x, padding)
    dense = x + fc2(fc1(norm(x)).relu())
    torch.testing.assert_close(y[:18], dense[:18], rtol=1e-6, atol=1e-6)
    assert torch.equal(y[18:], x[18:])


def test_it_learns_from_the_start():
    """Zero adapters get gradients, then the gates and what is before the zeros do."""
    torch.manual_seed(0)
    block = SMoEBlock(D, F, (2, 2), make_experts=make_experts())
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    x, target = torch.randn(64, D), torch.randn(64, D)
    losses = []
    for _ in range(3):
        loss = (block(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_a_token_whose_expert_was_full_keeps_the_ffn():
    block = make_block((3,), top_k=1, capacity_factor=0.2).train()
    x = torch.randn(40, D, dtype=torch.float64)
    y, stats = block(x)
    kept_T = stats.gates[0].kept_C
    assert 0 < kept_T.sum() < 20
    experts = block.experts
    u = experts.ffn.fc2(experts.ffn.fc1(block.norms[0](x)).relu())
    torch.testing.assert_close(y[~kept_T], (x + u)[~kept_T])
    assert ((y - x - u)[kept_T].abs().sum(1) > 1e-3).all()


# --------------------------------------------------------------------------------------
# work and memory


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("strata", [(4,), (2, 3), (1, 2, 1)])
def test_the_ffn_runs_once_a_token(strata, backend, monkeypatch):
    """For those that leave, and those with an expert in the last stratum; also in backward."""
    import fairseq_smoe.moe.expert_kinds.adapter as module

    seen, stock = [], module.two_layers

    def two_layers(rows, runs, shared, experts, activate):
        if shared.fc1.weight_EIO.shape[2] == F:
            seen.append(int(runs.rows_E.sum()))
        return stock(rows, runs, shared, experts, activate)

    monkeypatch.setattr(module, "two_layers", two_layers)
    block = make_block(strata, dtype=torch.float32, capacity_factor=None)
    block.experts.options.moe_expert_backend = backend
    _, stats = block(torch.randn(50, D), torch.arange(50) >= 45)
    expected = []
    for gate, visible in zip(stats.gates, block.visible):
        last = gate.expert_C + visible.start >= sum(strata[:-1])
        last = last if gate.here_C is None else last & gate.here_C
        expected.append(len(set(gate.token_C[last].tolist())))
    assert seen == expected


def test_flops_done_are_those_counted():
    """Under uniform gates."""
    torch.manual_seed(0)
    block = SMoEBlock(D, F, (2, 2), make_experts=make_experts(), capacity_factor=None)
    for gate in block.gates:
        gate.logits = lambda tokens, size=gate.weight.shape[0]: torch.randn(len(tokens), size)
    tokens = 20000
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(tokens, D))
    passes = zip(block.expected_visits(), block.visible, block.expected_choices())
    per_token = sum(visits * block.experts.params_used(*rest) for visits, *rest in passes)
    # most are the FFN's, whose biases are counted but are no products
    per_token *= 2 * D * F / (2 * D * F + F + D)
    assert counter.get_total_flops() == pytest.approx(2 * tokens * per_token, rel=0.05)


@pytest.mark.parametrize("frozen, times", [("none", 2), ("ffn", 1)])
def test_a_frozen_ffn_takes_no_gradient(frozen, times):
    block = SMoEBlock(D, F, (4,), make_experts=make_experts(pesc_freeze=frozen))
    for gate in block.gates:
        gate.logits = lambda tokens: torch.randn(len(tokens), 4)
        gate.capacity = lambda number: None
    with FlopCounterMode(display=False) as counter:
        y, _ = block(torch.randn(100, D, requires_grad=True))
    adapters, ffn = 4 * D * A * 200, 4 * D * F * 100
    assert counter.get_total_flops() == adapters + ffn
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * adapters + times * ffn
    assert all(p.grad is None for p in block.experts.ffn.parameters()) == (frozen == "ffn")


@pytest.mark.parametrize("strata, top_k", [((4, 4), 2), ((8,), 1), ((2, 2, 2), 2)])
def test_activations_are_those_that_autograd_keeps(strata, top_k):
    torch.manual_seed(1)
    make = make_experts(pesc_adapter_dim=64)
    block = SMoEBlock(256, 512, strata, top_k, make_experts=make, capacity_factor=None)
    x = torch.randn(500, 256, requires_grad=True)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y, stats = block(x, torch.arange(500) >= 490)
    for parameter in block.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    visits = [gate.num_tokens for gate in stats.gates]
    rows = [len(gate.expert_C) for gate in stats.gates]
    formula = scaling.activation_bytes(scaling.Block.of(block), visits, rows, rows, 4)
    assert 0.95 * formula < sum(kept.values()) < 1.05 * formula


def test_parameters_are_counted():
    experts = make_experts()((2, 3), D, F)
    assert experts.num_parameters() == 5 * 2 * D * A
    ffn = 2 * D * F + D + F
    assert sum(p.numel() for p in experts.ffn.parameters()) == ffn
    assert experts.params_used(range(2, 5), 2) == 2 * 2 * D * A + ffn
    missed = 2 / 5 * 1 / 4  # both of two choices in the first stratum
    assert experts.params_used(range(5), 2) == pytest.approx(2 * 2 * D * A + (1 - missed) * ffn)
    assert experts.params_used(range(5), 1) == pytest.approx(2 * D * A + 3 / 5 * ffn)
    between = experts.params_used(range(5), 1.5) - 1.5 * 2 * D * A
    assert between == pytest.approx((1 - (2 / 5 + missed) / 2) * ffn)
    assert make_experts(pesc_adapter_dim=0)((2,), D, F).adapter_dim == D // 2


def test_the_device_is_never_waited_for():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            make = make_experts(moe_expert_backend="grouped_mm", pesc_adapter_dim=8)
            block = SMoEBlock(16, 32, (2, 2), make_experts=make)
            x = torch.randn(9, 16, requires_grad=True)
            block(x, torch.zeros(9, dtype=torch.bool))[0].sum().backward()
            assert x.grad.shape == (9, 16)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("strata", [(4,), (2, 3), (1, 2, 1)])
@pytest.mark.parametrize("padded", [False, True])
def test_backends_agree(strata, padded):
    blocks = [
        make_block(strata, dtype=torch.float32, moe_expert_backend=backend, capacity_factor=1.0)
        for backend in ("loop", "grouped_mm")
    ]
    x = torch.randn(40, D)
    outputs = [block(x, torch.arange(40) > 33 if padded else None)[0] for block in blocks]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for y in outputs:
        y.square().mean().backward()
    for (name, p), q in zip(blocks[0].named_parameters(), blocks[1].parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_evaluation_of_a_token_does_not_depend_on_the_others():
    block = make_block((2, 1, 2), dtype=torch.float32, pesc_dropout=0.3).eval()
    x = torch.randn(30, D)
    together, order = block(x)[0], torch.randperm(30)
    assert torch.equal(block(x)[0], together)
    torch.testing.assert_close(block(x[order])[0], together[order], rtol=1e-5, atol=1e-6)
    alone = torch.cat([block(token[None])[0] for token in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_dropout_is_on_the_adapters_alone():
    block = make_block((4,), dtype=torch.float32, pesc_dropout=0.5).train()
    x = torch.randn(30, D)
    assert not torch.equal(block(x)[0], block(x)[0])
    nn.init.zeros_(block.experts.up_weight)
    assert torch.equal(block(x)[0], block(x)[0])


# --------------------------------------------------------------------------------------
# processes, options


def make_busy_experts(*args, **kwargs):
    experts = make_experts(pesc_dropout=0.0)(*args, **kwargs)
    everyone = torch.randn(sum(experts.strata), A, D)  # the same on all ranks
    own = everyone if experts.group is None else experts.group.share(everyone)
    experts.up_weight.data.copy_(own)
    return experts


def compare_in_processes(rank, size):
    for strata in ((4,), (4, 4), (2, 1, 1)):
        compare(rank, size, strata=strata, make_experts=make_busy_experts)
    compare(rank, size, capacity_factor=0.5, make_experts=make_busy_experts)


@pytest.mark.parametrize("size", [2, 4])
def test_processes_that_share_experts_compute_what_one_computes(size):
    run_ranks(compare_in_processes, size, size)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pesc_adapter_dim": -8}, "--pesc-adapter-dim -8: expected 1 or more"),
        (
            {"pesc_adapter_dim": 12, "moe_expert_backend": "grouped_mm"},
            "--pesc-adapter-dim 12 with --moe-expert-backend grouped_mm: expected a multiple of 8",
        ),
        ({"pesc_freeze": "gates"}, "--pesc-freeze gates: expected none or ffn or backbone"),
        ({"pesc_dropout": 1.0}, "--pesc-dropout 1.0: expected a fraction"),
        ({"smoe_stacking": True}, "--smoe-stacking with --moe-experts adapter"),
        ({"moe_arrangement": "stacking"}, "--smoe-stacking with --moe-experts adapter"),
        ({"moe_experts": "ffn", "pesc_freeze": "ffn"}, "--pesc-freeze ffn: needs --moe-experts"),
        ({"moe_experts": "ffn", "pesc_adapter_dim": 64}, "--pesc-adapter-dim 64: needs"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(OptionError, match=message):
        check_kinds(model_options(**{"moe_experts": "adapter", **options}), (2, 2))


def test_by_name():
    block = build(moe_experts="adapter", pesc_adapter_dim=7, pesc_freeze="ffn")
    assert block.experts.down_weight.shape == (4, 6, 7)
    frozen = {name for name, p in block.named_parameters() if not p.requires_grad}
    assert frozen == {f"experts.ffn.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
