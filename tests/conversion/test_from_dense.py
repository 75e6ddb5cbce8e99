"""A dense model with adapters, and with experts that are copies of its FFNs: at first they compute
what the dense model does."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import toy_task
from converting import convert, loss, predictions, refusal
from toy_task import generate, run, train

from fairseq_smoe.__main__ import main
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.parts import read_checkpoint, whole
from fairseq_smoe.conversion.source import Source
from fairseq_smoe.conversion.upcycle import copy_into_experts
from fairseq_smoe.translation.layers import expert_layers

DENSE = toy_task.MODELS["dense"]
LAYOUTS = ("8", "4-4", "2-2-2-2")


@pytest.fixture(scope="module")
def dense(trained):
    return trained("dense")


@pytest.fixture(scope="module")
def expected(dense, data):
    """What the dense model makes of a test set: logits, targets, and lines of translations."""
    logits, targets = predictions(*toy_task.load(data, dense))
    return SimpleNamespace(logits=logits, targets=targets, lines=lines_of(data, dense))


def lines_of(data, checkpoint):
    found = generate(data, checkpoint).sentences
    assert len(found) == toy_task.SPLIT_SIZES["test"]
    return [found[i][1] for i in sorted(found)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["pesc", "upcycle"])
def test_it_starts_as_the_dense_model(kind, layout, dense, expected, data, tmp_path):
    """The translations, line by line, and the loss; and the logits with any weights of the gates,
    and other numbers of experts."""
    made = convert(kind, dense, tmp_path / "made.pt", "--strata", layout)
    assert lines_of(data, made.path) == expected.lines
    task, model = toy_task.load(data, made.path)
    found, _ = predictions(task, model)
    own_loss, dense_loss = loss(found, expected.targets), loss(expected.logits, expected.targets)
    assert own_loss == pytest.approx(dense_loss, abs=1e-6)
    for spread in (0.0, 1.0, 100.0):
        for _, layer in expert_layers(model):
            for gate in layer.routed_block.gates:
                torch.nn.init.normal_(gate.weight, std=spread)
                gate.top_k = 1 if kind == "pesc" and spread else gate.top_k
        found, _ = predictions(task, model)
        torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=2e-5)


def test_any_gate_whose_weights_sum_to_one(dense, expected, data, tmp_path):
    words = ("--strata", "4-4", "--moe-gate", "threshold")
    made = convert("upcycle", dense, tmp_path / "made.pt", *words)
    assert made.flags[-6:] == [
        *("--moe-gate", "threshold", "--moe-threshold-weights", "renormalised"),
        *("--smoe-pass-scale", "1,0"),
    ]
    task, model = toy_task.load(data, made.path)
    found, _ = predictions(task, model)
    torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=2e-5)


def test_in_training_too(dense, data, tmp_path):
    """As long as no expert is full."""
    for kind in ("pesc", "upcycle"):
        made = convert(kind, dense, tmp_path / f"{kind}.pt", "--strata", "4-4")
        task, model = toy_task.load(data, made.path)
        expected, _ = predictions(task, model)
        for module in model.modules():
            module.capacity = lambda number: None
        model.train()
        for module in model.modules():  # toy models have no dropout but in their options
            if isinstance(getattr(module, "p", None), float):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        found, _ = predictions(task, model)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


# --------------------------------------------------------------------------------------
# trained on


@pytest.mark.parametrize(
    "kind, words",
    [
        ("pesc", ["--strata", "4-4", "--adapter-dim", "32", "--freeze", "backbone", "--top1"]),
        ("upcycle", ["--strata", "2-2-2-2", "--noise", "0.02", "--decoder-moe-freq", "1"]),
    ],
)
def test_it_is_trained_on(kind, words, dense, data, tmp_path):
    """With the options that the conversion prints; then it translates and is analysed."""
    made = convert(kind, dense, tmp_path / "made.pt", *words)
    folder, more = tmp_path / "run", {"dropout": 0, "log_interval": 1, "lr": 1e-3}
    outcome = train(data, folder / "checkpoints", *DENSE, *made.flags, max_update=20, **more)
    again = ("--finetune-from-model", dense)
    before = train(data, tmp_path / "dense", *DENSE, *again, max_update=1, **more)
    assert outcome.losses()[0] == pytest.approx(before.losses()[0], abs=0.1)
    last = folder / "checkpoints" / "checkpoint_last.pt"
    assert generate(data, last).bleu > 90
    start, trained = (read_checkpoint(path)["model"] for path in (made.path, last))
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    if kind == "pesc":
        assert changed and all(re.search(r"\.gates\.|\.(up|down)_weight$", n) for n in changed)
    else:
        assert {n for n in start if n.endswith(".pass_scale")} <= changed
    main(["analyse", "--run", str(folder), "--directions", "en-aa"])
    assert "en-aa,encoder,1,2," in (folder / "analysis" / "valid" / "capacity.csv").read_text()


def test_processes_that_share_the_experts_train_it_on(dense, data, tmp_path):
    made = convert("upcycle", dense, tmp_path / "made.pt", "--strata", "4-4", "--noise", "0.01")
    words = toy_task.train_command(
        data, tmp_path / "two", *DENSE, *made.flags, max_update=3, dropout=0, log_interval=1
    )
    run("torchrun", "--standalone", "--nproc_per_node", 2, "--no-python", *words)
    state = whole(read_checkpoint(tmp_path / "two" / "checkpoint_last.pt"))["model"]
    start = read_checkpoint(made.path)["model"]
    assert state.keys() == start.keys()
    block = "encoder.layers.1.expert_block"
    for name in ("experts.fc1_weight", "pass_scale"):
        assert not torch.equal(state[f"{block}.{name}"], start[f"{block}.{name}"])
        torch.testing.assert_close(
            state[f"{block}.{name}"], start[f"{block}.{name}"], rtol=0, atol=0.05
        )


# --------------------------------------------------------------------------------------
# what is made


def test_what_adapters_are_made_of(dense, tmp_path):
    """The dense model's parameters, drawn gates and input weights, and zeros; the seed decides."""
    words = ("--strata", "4-4", "--adapter-dim", "16", "--freeze", "ffn")
    made = [
        convert("pesc", dense, tmp_path / f"{i}.pt", *words, "--seed", seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    old = read_checkpoint(dense)["model"]
    first, again, other = (read_checkpoint(m.path)["model"] for m in made)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for side in ("encoder", "decoder"):
        layer, block = f"{side}.layers.1", f"{side}.layers.1.expert_block"
        for part in ("fc1", "fc2"):
            for kind in ("weight", "bias"):
                own = first.pop(f"{block}.experts.ffn.{part}.{kind}")
                assert torch.equal(own, old.pop(f"{layer}.{part}.{kind}"))
        for kind in ("weight", "bias"):
            dense_norm = old.pop(f"{layer}.final_layer_norm.{kind}")
            for i in range(2):
                assert torch.equal(first.pop(f"{block}.norms.{i}.{kind}"), dense_norm)
        assert not first.pop(f"{block}.experts.up_weight").any()
        for name in ("experts.down_weight", "gates.0.weight", "gates.1.weight"):
            drawn = first.pop(f"{block}.{name}")
            assert drawn.std() > 0.01 and not torch.equal(drawn, other[f"{block}.{name}"])
    assert first.keys() == old.keys()
    assert all(torch.equal(first[name], old[name]) for name in old)
    report = made[0].report
    assert report["layers"] == ["encoder.layers.1", "decoder.layers.1"]
    added = 2 * (8 * 2 * 64 * 16 + (8 + 4) * 64 + 2 * 64)  # adapters, gates, one more LayerNorm
    assert report["parameters"]["after"] - report["parameters"]["before"] == added
    described = describe(made[0].path)
    assert described["parameters"] == report["parameters"]["after"]
    assert described["experts"] == "strata 4-4" and described["optimizer"] == "none"


def test_noise_tells_experts_apart(dense, tmp_path):
    for noise in (0, 0.1):
        words = ("--strata", "2-2", "--noise", noise, "--encoder-moe-freq", "1")
        made = convert("upcycle", dense, tmp_path / f"{noise}.pt", *words)
        assert len(made.report["layers"]) == 3
        old, new = read_checkpoint(dense)["model"], read_checkpoint(made.path)["model"]
        for part in ("fc1", "fc2"):
            for kind in ("weight", "bias"):
                dense_tensor = old[f"encoder.layers.0.{part}.{kind}"].t()
                stacked_E = new[f"encoder.layers.0.expert_block.experts.{part}_{kind}"]
                if not noise:
                    assert all(torch.equal(own, dense_tensor) for own in stacked_E)
                    continue
                errors_E = stacked_E - dense_tensor
                relative = errors_E.square().mean() / dense_tensor.square().mean()
                assert relative.sqrt() == pytest.approx(noise, rel=0.1)
                assert abs(torch.corrcoef(errors_E.flatten(1))[0, 1]) < 0.3
        assert new["encoder.layers.0.expert_block.pass_scale"].tolist() == [1, 0]
        number = made.report["parameters"]
        # three more FFNs, two gates, one more LayerNorm, and the passes' scales
        added = 3 * (2 * 64 * 128 + 128 + 64) + (4 + 2) * 64 + 2 * 64 + 2
        assert number["after"] - number["before"] == 3 * added


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_precision_stays(dtype, dense, tmp_path):
    state = read_checkpoint(dense)
    state["model"] = {
        n: v.to(dtype) if v.is_floating_point() else v for n, v in state["model"].items()
    }
    torch.save(state, tmp_path / "typed.pt")
    source = Source(tmp_path / "typed.pt")
    copy_into_experts(source, (2, 2), "top-k", {"moe_freq": 2}, noise=1e-3)
    new = source.result()["model"]
    assert {v.dtype for n, v in new.items() if "expert_block" in n} == {dtype}
    error = new["encoder.layers.1.expert_block.experts.fc1_weight"][0].double().t()
    error -= state["model"]["encoder.layers.1.fc1.weight"].double()
    assert 0 < error.norm() < 1e-2 * state["model"]["encoder.layers.1.fc1.weight"].double().norm()


# --------------------------------------------------------------------------------------
# what is refused


@pytest.fixture(scope="module")
def with_other_options(dense, make_once):
    """``with_other_options(**options)``: the dense checkpoint, as if trained with others."""

    def changed(**options):
        def make(folder):
            state = read_checkpoint(dense)
            state["cfg"]["model"].update(options)
            torch.save(state, folder / "checkpoint.pt")

        return make_once("-".join(["dense", *options]), make) / "checkpoint.pt"

    return changed


@pytest.mark.parametrize("kind", ["pesc", "upcycle"])
def test_other_models_are_refused(kind, trained, with_other_options, data, tmp_path):
    output, strata = tmp_path / "made.pt", ("--strata", "4-4")
    assert "has experts already, strata 2-2-2-2" in refusal(kind, trained("smoe"), output, *strata)
    post_norm = with_other_options(post_norm=True)
    assert "is a post-norm model" in refusal(kind, post_norm, output, *strata)
    message = refusal(kind, with_other_options(smoe_norm="released"), output, *strata)
    assert "--smoe-norm released" in message
    part = tmp_path / "parts" / "checkpoint.pt"
    run(
        *("python", "-m", "fairseq_smoe", "checkpoint", "split"),
        *(trained("smoe"), part, "--parts", 2),
    )
    (one_part,) = part.parent.glob("experts-*/part-0-of-2.pt")
    message = refusal(kind, one_part, output, *strata)
    assert str(one_part) in message and "part" in message
    shutil.copy(part, tmp_path / "alone.pt")
    assert "part-0-of-2.pt is missing" in refusal(kind, tmp_path / "alone.pt", output, *strata)


@pytest.mark.parametrize(
    "kind, words, named",
    [
        ("pesc", ["--strata", "4-x"], ["--smoe-strata '4-x'", "as in 4-4-8"]),
        ("pesc", ["--strata", "4", "--moe-freq", "3"], ["--moe-freq 3", "2+2 layers", "lower it"]),
        ("pesc", ["--strata", "4", "--moe-freq=-1"], ["--moe-freq -1", "1 or more"]),
        ("pesc", ["--strata", "4", "--adapter-dim=-8"], ["--pesc-adapter-dim -8", "1 or more"]),
        ("pesc", ["--strata", "4", "--seed=-1"], ["--seed -1", "from 0"]),
        ("upcycle", ["--strata", "4", "--noise=-1"], ["--noise -1", "0 (none) or more"]),
        ("upcycle", ["--strata", "4", "--noise", "nan"], ["--noise nan", "0 (none) or more"]),
        ("upcycle", ["--strata", "4", "--moe-top1-expert"], ["--moe-top1-expert", "probability"]),
        ("upcycle", ["--strata", "4", "--moe-eom", "0.1"], ["--moe-eom", "scaled", "leave it out"]),
        ("upcycle", ["--strata", "4", "--moe-cmr"], ["--moe-cmr", "beside", "leave it out"]),
    ],
)
def test_wrong_options(kind, words, named, dense, tmp_path):
    message = refusal(kind, dense, tmp_path / "made.pt", *words)
    for text in named:
        assert text in message
