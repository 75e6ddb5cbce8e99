"""Networks that are split into small experts (MoEfication)."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from test_doors import model_options
from test_expert_group import compare
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe import small_experts
from fairseq_smoe.moe.block import SMoEBlock
from fairseq_smoe.moe.dispatch import Runs
from fairseq_smoe.moe.doors import check_kinds
from fairseq_smoe.moe.expert_kinds.moefied import MoefiedExperts, MoefiedOptions
from fairseq_smoe.moe.moefied_ffn import MoefiedFFN
from fairseq_smoe.moe.small_counts import check_split, number_kept, usual_number

D, P, W = 8, 6, 4
H = P * W
select_of = st.sampled_from(["mlp", "similarity", "oracle"])


def make_dense(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(D, H).to(dtype), nn.Linear(H, D).to(dtype)


def permuted(fc1, fc2, order):
    """The layers with their hidden units in another order."""
    first, second = nn.Linear(D, H).to(fc1.weight), nn.Linear(H, D).to(fc1.weight)
    with torch.no_grad():
        first.weight[:], first.bias[:] = fc1.weight[order], fc1.bias[order]
        second.weight[:], second.bias[:] = fc2.weight[:, order], fc2.bias
    return first, second


def moefied(layers, select="mlp", k="0", router_seed=None):
    ffn = MoefiedFFN(*layers, MoefiedOptions(moefy_experts=P, moefy_k=str(k), moefy_select=select))
    ffn.to(layers[0].weight.dtype)
    with torch.no_grad():  # exactly: they have been through float32
        ffn.experts.fc1_weight[0], ffn.experts.fc1_bias[0] = layers[0].weight, layers[0].bias
        ffn.experts.fc2_weight[0], ffn.experts.fc2_bias[0] = layers[1].weight.t(), layers[1].bias
    if router_seed is not None:
        torch.manual_seed(router_seed)
        for name in ("router_in", "router_out"):
            if hasattr(ffn.experts, name):
                nn.init.normal_(getattr(ffn.experts, name))
    return ffn


def apply_dense(layers, x):
    return layers[1](F.relu(layers[0](x)))


# --------------------------------------------------------------------------------------
# the reference: all of the first product, masked


def reference_scores(experts, e, x, hidden):
    if experts.options.moefy_select == "oracle":
        return hidden.unflatten(1, (experts.num_small, -1)).sum(2)
    products = x @ experts.router_in[e].t()
    if experts.options.moefy_select == "similarity":
        return products
    return torch.tanh(products / x.norm(dim=1, keepdim=True)) @ experts.router_out[e].t()


def masked(experts, e, x):
    """Network ``e`` of ``experts`` for rows ``x``: (N, D)."""
    hidden = F.relu(x @ experts.fc1_weight[e].t() + experts.fc1_bias[e])
    best = reference_scores(experts, e, x, hidden).topk(experts.kept, dim=1).indices
    mask = torch.zeros(len(x), experts.num_small).scatter_(1, best, 1.0).to(x.dtype)
    hidden = hidden * mask.repeat_interleave(experts.ffn_dim // experts.num_small, dim=1)
    return hidden @ experts.fc2_weight[e] + experts.fc2_bias[e]


def make_experts(number, select, kept, seed):
    torch.manual_seed(seed)
    options = MoefiedOptions(moefy_experts=P, moefy_k=str(kept), moefy_select=select)
    experts = MoefiedExperts((number,), D, H, options).double()
    for name in ("router_in", "router_out"):
        if hasattr(experts, name):
            nn.init.normal_(getattr(experts, name))
    return experts


@settings(deadline=None, max_examples=80)
@given(
    rows_E=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    select=select_of,
    kept=st.integers(1, P),
    seed=st.integers(0, 1000),
)
def test_chosen_experts_are_the_masked_network(rows_E, select, kept, seed):
    """Outputs and all gradients; in evaluation by both ways of multiplying."""
    experts = make_experts(len(rows_E), select, kept, seed)
    x = torch.randn(sum(rows_E), D, dtype=torch.float64, requires_grad=True)
    runs = Runs(torch.tensor(rows_E), sum(rows_E))

    def run():
        return experts(x, runs, experts.share(x.dtype), range(len(rows_E)))

    y = run()
    parts = [masked(experts, e, rows) for e, rows in enumerate(x.split(rows_E))]
    expected, direction = torch.cat(parts), torch.randn(len(x), D, dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
    trained = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    assert set(trained) == {"fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"}
    inputs = [x, *trained.values()]
    ours, theirs = (
        torch.autograd.grad((out * direction).sum(), inputs, materialize_grads=True)
        for out in (y, expected)
    )
    for own, other in zip(ours, theirs):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9)
    few = small_experts.FEW_ROWS
    try:
        for small_experts.FEW_ROWS in (0, 10**6):
            with torch.no_grad():
                torch.testing.assert_close(run(), expected, rtol=0, atol=1e-9)
    finally:
        small_experts.FEW_ROWS = few


def test_all_passes_of_a_block_share_the_gradients():
    """Two strata: most tokens visit the experts twice."""
    options = MoefiedOptions(moefy_experts=P, moefy_k="2")
    make = partial(MoefiedExperts, options=options)
    torch.manual_seed(0)
    block = SMoEBlock(D, H, (3, 2), capacity_factor=None, make_experts=make).double()
    x = torch.randn(20, D, dtype=torch.float64)

    class Masked(nn.Module):
        """In the place of a block's experts."""

        exchanges, loss_weights = False, {}

        def __init__(self, experts):
            super().__init__()
            self.experts = experts

        def share(self, dtype):
            return self.experts.share(dtype)

        def losses(self, *_):
            return {}

        def visit(self, tokens, choices, plan, weights, shared, visible, here=None):
            out = torch.zeros_like(tokens)
            for expert, token, weight in zip(choices.expert_C, choices.token_C, weights):
                y = masked(self.experts, visible.start + int(expert), tokens[token][None])
                out = out.index_add(0, token[None], weight * y)
            return out

    grads = []
    experts = block.experts
    for block.experts in (experts, Masked(experts)):
        block.zero_grad()
        y, stats = block(x)
        assert stats.passes.float().mean() > 1.3
        y.square().sum().backward()
        grads.append({n: p.grad for n, p in experts.named_parameters() if p.requires_grad})
        grads[-1] |= {n: p.grad for n, p in block.gates.named_parameters()}
    for name, gradient in grads[0].items():
        torch.testing.assert_close(gradient, grads[1][name], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------
# all experts kept, and the oracle


@settings(deadline=None, max_examples=50)
@given(order=st.permutations(range(H)), select=select_of, seed=st.integers(0, 1000))
def test_all_experts_are_the_dense_network(order, select, seed):
    """Whatever the partition, in float32, in training and in evaluation."""
    layers = make_dense(seed, torch.float32)
    ffn = moefied(permuted(*layers, list(order)), select, k=0, router_seed=seed)
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(ffn(x), apply_dense(layers, x), rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(ffn(x), apply_dense(layers, x), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    order=st.permutations(range(H)),
    shift=st.floats(-2, 0.5),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_an_oracle_that_keeps_all_busy_experts_is_exact(order, shift, tokens, seed):
    layers = make_dense(seed)
    layers[0].bias.data += shift  # so that many units are zero
    layers = permuted(*layers, list(order))
    x = torch.randn(tokens, D, dtype=torch.float64)
    busy = (layers[0](x).unflatten(1, (P, W)) > 0).any(2).sum(1).max().item()
    ffn = moefied(layers, "oracle", k=max(busy, 1))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ffn(x), apply_dense(layers, x), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(select=select_of, kept=st.integers(1, P), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(select, kept, seed):
    """Few rows and many are multiplied in different ways."""
    ffn = moefied(make_dense(seed), select, kept, router_seed=seed)
    x = torch.randn(700, D, dtype=torch.float64)
    with torch.no_grad():
        together = ffn(x)
        for rows in (slice(1), slice(1, 20), slice(20, 200)):
            torch.testing.assert_close(ffn(x[rows]), together[rows], rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------
# what is computed


def in_place(self, mat1, mat2, out_shape=None, **_):
    return mm_flop(mat1, mat2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("select", ["mlp", "similarity"])
def test_chosen_experts_are_computed_alone(select, training, monkeypatch):
    """Products are those of the router and of the experts that are kept, and no others."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unused")  # torch's counter sets it
    layers, kept, rows = make_dense(), 2, 500
    ffn = moefied(layers, select, kept, router_seed=1)
    x = torch.randn(rows, D, dtype=torch.float64)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with torch.set_grad_enabled(training), counter:
        ffn(x)
    router = P * D + (P * P if select == "mlp" else 0)
    assert counter.get_total_flops() == 2 * rows * (2 * kept * W * D + router)
    biases = kept * W + D
    assert ffn.experts.params_used(range(1), 1) == 2 * kept * W * D + router + biases


def test_dropout_of_hidden_units():
    """In training alone."""
    options = MoefiedOptions(moefy_experts=P, moefy_k="3")
    ffn = MoefiedFFN(*make_dense(dtype=torch.float32), options, activation_dropout=0.5)
    x = torch.randn(50, D)
    assert not torch.equal(ffn(x), ffn(x))
    with torch.no_grad():
        assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))


@pytest.mark.parametrize("kept", [2, 0])
def test_grouped_multiplication_is_the_loop(kept):
    outputs = []
    for backend in ("loop", "grouped_mm"):
        options = MoefiedOptions(backend, moefy_experts=P, moefy_k=str(kept))
        layers = make_dense(dtype=torch.float32)
        ffn = MoefiedFFN(*layers, options)
        x = torch.randn(30, D, requires_grad=True)
        torch.manual_seed(1)
        x.data = torch.randn(30, D)
        y = ffn(x)
        y.square().sum().backward()
        outputs.append([y, x.grad, *(p.grad for p in ffn.parameters() if p.requires_grad)])
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_half_precision():
    """Routers compute in float32; the general way of multiplying is used."""
    layers = make_dense(dtype=torch.float32)
    ffn = moefied(layers, k=3, router_seed=1)
    x = torch.randn(40, D).bfloat16()
    exact = ffn(x.float())
    with torch.no_grad():
        y = ffn.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    # another choice where two scores are nearly equal
    assert ((y - exact).abs() < 0.02).float().mean() > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        assert ffn.float()(x.float()).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------
# experts spread over processes


def compare_ranks(rank, world_size):
    for kept in (1, 0):
        options = MoefiedOptions(moefy_experts=4, moefy_k=str(kept))
        make = partial(MoefiedExperts, options=options)
        compare(rank, world_size, strata=(4, 4), make_experts=make)


def test_ranks_that_share_experts_compute_what_one_computes():
    run_ranks(compare_ranks, 2, 2)


# --------------------------------------------------------------------------------------
# numbers and refusals


def test_numbers_of_experts():
    assert [number_kept(k, 64) for k in ("0", "64", "16", "25%", "1%", "100%", 7)] == [
        *(64, 64, 16, 16, 1, 64, 7)
    ]
    assert usual_number([2048]) == 64 and usual_number([1024, 4096]) == 128
    assert usual_number([16]) == 1 and usual_number([96]) == 3 and usual_number([48, 64]) == 2


@pytest.mark.parametrize("k", ["65", "-1", "", "x", "0%", "101%", "2.5", "%", "²", 1.5, None])
def test_wrong_k_is_named(k):
    with pytest.raises(OptionError) as refusal:
        number_kept(k, 64)
    assert f"--moefy-k {k}" in str(refusal.value) and "--moefy-experts 64" in str(refusal.value)


def test_the_nearest_divisors_are_named():
    with pytest.raises(OptionError, match="--moefy-experts 60: .* 2048 .* is 32 or 64"):
        check_split(60, 2048)
    with pytest.raises(OptionError, match="nearest that does is 24"):
        check_split(100, 24)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(moefy_k="3"), "--moefy-k 3: needs --moefy-dense or --moe-experts moefied"),
        (dict(moefy_experts=8), "--moefy-experts 8: needs --moefy-dense"),
        (dict(moefy_dense=True), "--moefy-experts 0: expected the number"),
        (dict(moe_experts="moefied", moefy_experts=8, moefy_k="9"), "--moefy-k 9: expected"),
        (
            dict(moefy_dense=True, moefy_experts=8, moefy_select="best"),
            "--moefy-select best: expected mlp, similarity or oracle",
        ),
        (
            dict(moefy_dense=True, moefy_experts=8, activation_fn="gelu"),
            "--activation-fn gelu with small experts",
        ),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(OptionError) as refusal:
        check_kinds(model_options(**options), (4, 4))
    assert named in str(refusal.value)
