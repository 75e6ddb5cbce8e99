"""Experts of a trained mixture as products of tensors."""

import subprocess
import sys

import pytest
import torch
import toy_task
from converting import convert, loss, predictions, refusal
from toy_task import REPOSITORY, environment, generate, run, train

from fairseq_smoe.__main__ import main
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.parts import read_checkpoint
from fairseq_smoe.translation.layers import expert_layers

LAYERS = ("fc1", "fc2")
BLOCKS = ("encoder.layers.1.expert_block", "decoder.layers.1.expert_block")


def typed(checkpoint, dtype, path):
    state = read_checkpoint(checkpoint)
    for name, value in state["model"].items():
        state["model"][name] = value.to(dtype) if value.is_floating_point() else value
    torch.save(state, path)
    return path


def rebuilt(data, checkpoint, dtype=torch.float64):
    """``{block: (weight of fc1, its bias, weight of fc2, its bias)}``, over experts, of the model
    that a checkpoint loads into."""
    _, model = toy_task.load(data, checkpoint)
    model.to(dtype).load_state_dict(read_checkpoint(checkpoint)["model"])
    with torch.no_grad():
        return {
            f"{name}.expert_block": layer.routed_block.experts.weights(dtype)
            for name, layer in expert_layers(model)
        }


@pytest.mark.parametrize("bias", ["own", "common"])
@pytest.mark.parametrize("share", ["block", "stratum"])
def test_equal_experts_are_exact(share, bias, trained, data, tmp_path):
    """Upcycled, in double precision: all weights, and the translation loss."""
    dense = typed(trained("dense"), torch.float64, tmp_path / "dense.pt")
    copies = convert("upcycle", dense, tmp_path / "copies.pt", "--strata", "2-2")
    made = convert("factorise", copies.path, tmp_path / "made.pt", "--share", share, "--bias", bias)
    old = read_checkpoint(dense)["model"]
    for block, found in rebuilt(data, made.path).items():
        layer = block.removesuffix(".expert_block")
        for part, weight_E, bias_E in zip(LAYERS, found[::2], found[1::2]):
            expected = old[f"{layer}.{part}.weight"].t().expand(weight_E.shape)
            torch.testing.assert_close(weight_E, expected, rtol=0, atol=1e-12)
            expected = old[f"{layer}.{part}.bias"].expand(bias_E.shape)
            torch.testing.assert_close(bias_E, expected, rtol=0, atol=1e-12)
    assert all(
        max(errors) < 1e-12
        for own in made.report["relative errors"].values()
        for errors in own.values()
    )
    expected, targets = predictions(*toy_task.load(data, trained("dense")))
    found, _ = predictions(*toy_task.load(data, made.path))
    assert loss(found, targets) == pytest.approx(loss(expected, targets), abs=1e-6)


@pytest.fixture(scope="module")
def factorised(make_once, trained):
    """``factorised(name, *words)``: a trained model of ``toy_task.MODELS``, converted."""

    def made(name, *words):
        output = make_once("-".join(["factorised", name, *words]), lambda folder: None)
        return convert("factorise", trained(name), output / "made.pt", *words, "--force")

    return made


def test_errors_are_those_of_the_weights_and_fall_with_the_bond(factorised, trained, data):
    """Of experts that have been trained apart, which are never exact."""
    old = read_checkpoint(trained("smoe"))["model"]
    totals = []
    for bond in ("2", "8", "0"):
        made = factorised("smoe", "--bond", bond)
        found, totals_here = rebuilt(data, made.path, torch.float32), []
        for block in BLOCKS:
            for k, part in enumerate(LAYERS):
                weight_E = old[f"{block}.experts.{part}_weight"]
                missed_E = (found[block][2 * k] - weight_E).norm(dim=(1, 2))
                errors_E = made.report["relative errors"][f"{block}.experts"][part]
                expected_E = (missed_E / weight_E.norm(dim=(1, 2))).tolist()
                assert errors_E == pytest.approx(expected_E, rel=1e-3)
                assert torch.equal(found[block][2 * k + 1], old[f"{block}.experts.{part}_bias"])
                totals_here.append(sum(errors_E))
        totals.append(totals_here)
        inspected = describe(made.path)
        assert inspected["parameters"] == made.report["parameters"]["after"]
        assert inspected["experts"] == "strata 2-2-2-2"
    for before, after in zip(totals, totals[1:]):
        assert all(b < a for a, b in zip(before, after))
    assert all(0.1 < total / 8 < 1 for total in totals[-1])


def test_common_biases_are_the_means(factorised, trained):
    words = ("--share", "stratum", "--bias", "common", "--sweeps", "0")
    made = factorised("smoe", *words)
    old, new = (read_checkpoint(path)["model"] for path in (trained("smoe"), made.path))
    for block in BLOCKS:
        for part in LAYERS:
            bias_E = old[f"{block}.experts.{part}_bias"]
            mean_S = new[f"{block}.experts.common.{part}_bias"]
            torch.testing.assert_close(mean_S, bias_E.unflatten(0, (4, 2)).mean(1))
            errors_E = made.report["relative errors"][f"{block}.experts"][f"{part}_bias"]
            expected_E = (bias_E - mean_S.repeat_interleave(2, 0)).norm(dim=1) / bias_E.norm(dim=1)
            assert errors_E == pytest.approx(expected_E.tolist(), rel=1e-4)


def test_experts_in_parts(factorised, trained, tmp_path):
    made = factorised("smoe", "--bond", "8")
    parts = tmp_path / "parts.pt"
    words = ("python", "-m", "fairseq_smoe", "checkpoint", "split", trained("smoe"), parts)
    run(*words, "--parts", 2)
    again = convert("factorise", parts, tmp_path / "made.pt", "--bond", "8")
    expected, found = (read_checkpoint(path)["model"] for path in (made.path, again.path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_dense_model_becomes_one_of_products_that_is_trained_on(trained, data, tmp_path):
    """Upcycled, factorised with noise, trained with the options that both print."""
    copies = convert("upcycle", trained("dense"), tmp_path / "copies.pt", "--strata", "4-4")
    made = convert("factorise", copies.path, tmp_path / "made.pt", "--noise", "0.01")
    first, *_ = rebuilt(data, made.path, torch.float32)[BLOCKS[0]]
    assert (first[0] - first[1]).norm() > 1e-3 * first[0].norm()
    assert made.report["parameters"]["after"] < 0.7 * made.report["parameters"]["before"]
    words = [*toy_task.MODELS["dense"], *copies.flags, *made.flags]
    options = {"max_update": 20, "lr": 1e-3, "dropout": 0, "log_interval": 1}
    outcome = train(data, tmp_path / "run" / "checkpoints", *words, **options)
    assert outcome.losses()[0] < 1  # in bits; that of a new model is above 5
    last = tmp_path / "run" / "checkpoints" / "checkpoint_last.pt"
    assert generate(data, last).bleu > 90
    main(["analyse", "--run", str(tmp_path / "run"), "--directions", "en-aa"])
    assert (tmp_path / "run" / "analysis" / "valid" / "capacity.csv").exists()


def test_trained_experts_recover(trained, data, tmp_path):
    """Experts that have been trained apart lose much, and learn it again."""
    made = convert("factorise", trained("smoe"), tmp_path / "made.pt")
    options = {"max_update": 20, "lr": 1e-3, "dropout": 0, "log_interval": 1}
    losses = train(
        data, tmp_path / "run", *toy_task.MODELS["smoe"], *made.flags, **options
    ).losses()
    assert losses[-1] < losses[0]
    assert generate(data, tmp_path / "run" / "checkpoint_last.pt").bleu > 50


# --------------------------------------------------------------------------------------
# what is refused, memory


@pytest.mark.parametrize(
    "name, words, named",
    [
        ("dense", [], ["is a dense model"]),
        ("smoe", ["--in-shape", "2,2,2"], ["--mpo-in-shape 2,2,2: multiplies to 8", "width is 64"]),
        ("smoe", ["--in-shape", "4,4,4", "--out-shape", "2,2,2,4,4"], ["as many factors in both"]),
        ("smoe", ["--bond=-1"], ["--mpo-bond -1", "0 (no limit) or more"]),
        ("smoe", ["--sweeps=-1"], ["--sweeps -1", "0 (none) or more"]),
        ("smoe", ["--noise=-1"], ["--noise -1", "0 (none) or more"]),
    ],
)
def test_refused(name, words, named, trained, tmp_path):
    message = refusal("factorise", trained(name), tmp_path / "made.pt", *words)
    for text in named:
        assert text in message


def test_other_experts_are_refused(trained, tmp_path):
    state = read_checkpoint(trained("smoe"))
    state["cfg"]["model"]["moe_experts"] = "sized"
    torch.save(state, tmp_path / "sized.pt")
    message = refusal("factorise", tmp_path / "sized.pt", tmp_path / "made.pt")
    assert "--moe-experts sized" in message and "--moe-experts ffn" in message


MEASURE = """
import re, sys, threading
from fairseq_smoe.__main__ import main
from fairseq_smoe.evaluation import set_up_fairseq
set_up_fairseq()
import fairseq_smoe.conversion.factorise, fairseq_smoe.conversion.pesc
import torch
torch.linalg.svd(torch.randn(64, 64)), torch.linalg.eigh(torch.eye(64))
def memory():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", status.read())[1]) * 1024
ended, peak, before = threading.Event(), [0], memory()
def sample():
    while not ended.wait(0.002):
        peak[0] = max(peak[0], memory())
thread = threading.Thread(target=sample)
thread.start()
main(["convert", *sys.argv[1:]])
ended.set()
thread.join()
print("needed", peak[0] - before)
"""


def needed(kind, checkpoint, output, *words):
    """The most memory of its own, not of mapped files, that a conversion has at any time."""
    command = [sys.executable, "-c", MEASURE, kind, *map(str, (checkpoint, output, *words))]
    done = subprocess.run(
        command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_is_less_than_twice_the_model(data, tmp_path):
    """Than the larger of the old and the new one, nearly all of which are experts."""
    sizes = {"encoder_embed_dim": 256, "encoder_ffn_embed_dim": 1024, "encoder_layers": 4}
    train(data, tmp_path, "--moe-freq", "0", **sizes, max_update=1, no_save_optimizer_state=True)
    dense = tmp_path / "checkpoint_last.pt"
    words = ("--strata", "8", "--moe-freq", "1", "--decoder-moe-freq", "0")
    for kind in ("pesc", "upcycle"):
        model = tmp_path / f"{kind}.pt"
        memory = needed(kind, dense, model, *words)
        assert memory < 2 * model.stat().st_size + 10e6
    old = model.stat().st_size
    assert old > 60e6
    memory = needed("factorise", model, tmp_path / "made.pt", "--noise", "0.01", "--sweeps", "1")
    assert memory < 2 * old + 10e6
