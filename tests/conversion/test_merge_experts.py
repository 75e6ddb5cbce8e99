"""``convert merge-experts``, and what fairseq's commands make of its outputs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import toy_task
from omegaconf import OmegaConf
from toy_task import MODELS, generate, run

from fairseq_smoe.__main__ import main
from fairseq_smoe.analysis.collector import RoutingCollector
from fairseq_smoe.checkpoints import transform
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.gates import gate_sizes
from fairseq_smoe.checkpoints.parts import read_checkpoint
from fairseq_smoe.conversion.experts_on_text import look_at
from fairseq_smoe.conversion.text import Text
from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.layers import expert_layers

FFN = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Drawing takes longer than the conversion of so small a model."""
    if "with_picture" not in request.fixturenames:
        monkeypatch.setattr("fairseq_smoe.plots.expert_groups.plot_groups", lambda *_: None)


@pytest.fixture
def with_picture():
    """Asked for by tests that look at it."""


def convert(source, output, *words):
    """Convert in this process; returns the report."""
    main(["convert", "merge-experts", str(source), str(output), *map(str, words)])
    return json.loads(output.with_suffix(".report.json").read_text())


def model_of(path):
    return torch.load(path, weights_only=False)["model"]


def save(path, data, *words, change=None):
    """An untrained model as a checkpoint.

    Args:
        change: called with its parameters, to change them.
    """
    cfg, _, model, _ = toy_task.set_up(data, *words)
    parameters = model.state_dict()
    if change is not None:
        change(parameters)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": parameters,
        "optimizer_history": [{"num_updates": 1, "optimizer_name": "", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "task_state": {},
        "last_optimizer_state": None,
    }
    torch.save(state, path)
    return path


def features(data, path):
    """What a model makes of the first sentences of the test set."""
    task, model = toy_task.load(data, path)
    dataset = task.dataset("test")
    sample = dataset.collater([dataset[i] for i in range(20)])
    with torch.no_grad():
        return model(**sample["net_input"])[0]


@pytest.fixture(scope="module")
def plain(make_once, data):
    """An untrained model in strata 4-4."""
    folder = make_once(
        "untrained-4-4", lambda f: save(f / "checkpoint.pt", data, "--smoe-strata", "4-4")
    )
    return folder / "checkpoint.pt"


# --------------------------------------------------------------------------------------
# as many as there are


@pytest.mark.parametrize(
    "words", [[], ["--merge", "learned", "--align", "--similarity", "weights"]], ids=["mean", "all"]
)
def test_as_many_as_there_are_change_nothing(words, short_run, data, tmp_path):
    source, output = short_run / "checkpoint_last.pt", tmp_path / "same.pt"
    convert(source, output, "--strata", "2-2-2-2", *words)
    before, after = model_of(source), model_of(output)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(features(data, output), features(data, source))


def test_translations_stay_with_as_many_as_there_are(trained, data, tmp_path):
    """Also with biases, which are 0 then."""
    source, output = trained("vanilla"), tmp_path / "same.pt"
    convert(source, output, "--experts", 8, "--gate-bias", "--similarity", "weights")
    assert not model_of(output)["encoder.layers.1.expert_block.gates.0.logit_bias"].any()
    before = generate(data, source)
    assert before.bleu > 90
    assert generate(data, output).sentences == before.sentences


# --------------------------------------------------------------------------------------
# fewer


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_merged_model_trains_on_and_translates(processes, trained, plain, data, tmp_path):
    """With the options that the command prints; in two processes, which share the experts."""
    source, size = (plain, "--strata=2-4") if processes > 1 else (trained("vanilla"), "--experts=4")
    output = tmp_path / "merged.pt"
    command = ("convert", "merge-experts", source, output, size, "--gate-bias")
    printed = run("python", "-m", "fairseq_smoe", *command)
    flags = re.search(r"--finetune-from-model \S+ (.*)", printed.stdout)[1].split()
    strata = size.split("=")[1]
    assert flags == ["--smoe-strata", strata, "--moe-gate-bias"]
    assert describe(output)["experts"] == f"strata {strata}"
    words = toy_task.train_command(
        data, tmp_path / "run", *flags, finetune_from_model=output, max_update=20, log_interval=1
    )
    if processes > 1:
        words = [
            "torchrun",
            "--standalone",
            "--nproc_per_node",
            processes,
            "-m",
            "fairseq_cli.train",
        ] + words[1:]
        words += ["--distributed-world-size", processes]
    outcome = run(*words)
    losses = outcome.losses()
    assert np.mean(losses[-3:]) < losses[0]
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    bias = read_checkpoint(checkpoint)["model"]["encoder.layers.1.expert_block.gates.0.logit_bias"]
    assert bias.shape == (sum(map(int, strata.split("-"))),)
    assert len(generate(data, checkpoint).sentences) == toy_task.SPLIT_SIZES["test"]
    if processes == 1:
        assert losses[0] < 0.6 * generate_loss_of_guessing(), "it has not begun anew"


def generate_loss_of_guessing():
    """Bits per word of an untrained model, about."""
    return np.log2(len(toy_task.LANGS) * toy_task.NUM_WORDS + 4)


def test_shuffled_copies_merge_into_what_they_are_copies_of(data, tmp_path):
    """In strata, from the command line, with the groups found by each similarity."""
    small = save(tmp_path / "small.pt", data, "--smoe-strata", "2-2", "--moe-top1-expert")
    expected, sources = model_of(small), [0, 1, 0, 1, 2, 3, 3, 2]

    def copy(parameters):
        generator = torch.Generator().manual_seed(0)
        for name, tensor in expected.items():
            if ".expert_block." not in name or ".norms." in name:
                parameters[name].copy_(tensor)
        for side in ("encoder", "decoder"):
            block = f"{side}.layers.1.expert_block"
            for name in FFN:
                parameters[f"{block}.experts.{name}"].copy_(
                    expected[f"{block}.experts.{name}"][sources]
                )
            for i, own in enumerate((sources, [s - 2 for s in sources if s >= 2])):
                rows = expected[f"{block}.gates.{i}.weight"]
                parameters[f"{block}.gates.{i}.weight"].copy_(rows[own])
            w1, b1, w2, _ = (parameters[f"{block}.experts.{name}"] for name in FFN)
            for e in (2, 3, 6, 7):
                order = torch.randperm(b1.shape[1], generator=generator)
                w1[e], b1[e], w2[e] = w1[e][:, order], b1[e][order], w2[e][order]

    large = save(
        tmp_path / "large.pt", data, "--smoe-strata", "4-4", "--moe-top1-expert", change=copy
    )
    for words in (["--similarity", "surrogate"], ["--merge", "frequency"]):
        report = convert(
            large, tmp_path / "merged.pt", "--strata", "2-2", "--align", "--force", *words
        )
        groups = [[1, 3], [2, 4], [5, 8], [6, 7]]
        assert [block["groups"] for block in report["blocks"]] == [groups, groups]
        actual = model_of(tmp_path / "merged.pt")
        assert actual.keys() == expected.keys()
        exact = 0 if words[0] == "--similarity" else 1e-6  # a half is exact, other shares are not
        for name, tensor in expected.items():
            torch.testing.assert_close(actual[name], tensor, rtol=exact, atol=exact)
    convert(large, tmp_path / "mixed.pt", "--strata", "2-2", "--similarity", "surrogate")
    name = "encoder.layers.1.expert_block.experts.fc1_weight"
    difference = model_of(tmp_path / "mixed.pt")[name] - expected[name]
    assert difference.abs().mean() > 0.3 * expected[name].abs().mean(), "without --align"


def test_the_report_and_the_numbers_of_parameters(short_run, tmp_path, capsys, with_picture):
    source, output = short_run / "checkpoint_last.pt", tmp_path / "merged.pt"
    report = convert(source, output, "--strata", "1-2-1-2", "--merge", "frequency")
    printed = capsys.readouterr().out
    assert f"{output}\n{tmp_path}/merged.report.json\n{tmp_path}/merged.groups.png\n" in printed
    assert (tmp_path / "merged.groups.png").read_bytes().startswith(b"\x89PNG")
    assert report["strata"] == {"before": "2-2-2-2", "after": "1-2-1-2"}
    assert report["parameters"] == {
        "before": describe(source)["parameters"],
        "after": describe(output)["parameters"],
    }
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["text"] == {"subset": "valid", "sentences": 4 * 30}
    encoder, decoder = report["blocks"]
    assert encoder["groups"] == decoder["groups"] == [[1, 2], [3], [4], [5, 6], [7], [8]]
    visits = np.array(encoder["visits"])
    shares = [round(visits[e] / visits[:2].sum(), 6) for e in (0, 1)]
    assert encoder["weights"] == [
        shares,
        [1],
        [1],
        [round(v / visits[4:6].sum(), 6) for v in visits[4:6]],
        [1],
        [1],
    ]
    merged, before = model_of(output), model_of(source)
    block = "encoder.layers.1.expert_block"
    for name in (f"{block}.experts.fc1_weight", f"{block}.gates.0.weight"):
        expected = shares[0] * before[name][0] + shares[1] * before[name][1]
        torch.testing.assert_close(merged[name][0], expected, atol=1e-5, rtol=0)
    assert gate_sizes(merged)[block] == (6, 5, 3, 2)


# --------------------------------------------------------------------------------------
# the text


class Options:
    """Of ``commands/convert/text_options.py``."""

    data, subset, max_sentences, max_tokens = None, "valid", 10, 100


@pytest.mark.parametrize("name", ["smoe", "stacking", "multi-head", "pesc"])
def test_visits_and_similarities_are_those_of_the_text(name, data, tmp_path):
    """Against the counts of ``analyse``, and against the experts on all tokens at once."""
    path = save(tmp_path / "checkpoint.pt", data, *MODELS[name])
    text = Text(path, Options)
    with torch.no_grad():
        for parameter in text.model.parameters():
            if parameter.dim() == 3 and not parameter.any():
                parameter.normal_(std=0.1)  # adapters, which would all give 0
    layers = dict(expert_layers(text.model))
    inputs = {}
    handles = [
        gate.register_forward_hook(
            lambda _, given, __, key=(name, i): inputs.setdefault(key, []).append(given[0])
        )
        for name, layer in layers.items()
        for i, gate in enumerate(layer.routed_block.gates)
    ]
    with RoutingCollector(text.model, 100) as collector:
        text.run("reference")
        counts = collector.take()
    for handle in handles:
        handle.remove()
    names = [
        n
        for n, m in text.model.named_modules()
        if any(m is x.routed_block for x in layers.values())
    ]
    found = look_at(text, names, compare=True)
    for count, (layer_name, layer), seen in zip(
        counts, layers.items(), found.values(), strict=True
    ):
        assert seen.visits_E.tolist() == count.choices_E.tolist()
        block = layer.routed_block
        first = 0
        for s, size in enumerate(block.strata):
            own = range(first, first + size)
            first += size
            gates = [i for i, visible in enumerate(block.visible) if own.start in visible]
            assert len(gates) == (1 if name == "stacking" else s + 1)
            tokens = torch.cat([torch.cat(inputs[layer_name, i]) for i in gates])
            last = s == len(block.strata) - 1
            outputs = [apply(block.experts, e, tokens, last).double() for e in own]
            outputs = [x - x.mean(dim=0) for x in outputs]
            products = [[(x.t() @ y).norm().item() ** 2 for y in outputs] for x in outputs]
            size = np.sqrt(np.diag(products))
            expected = products / np.outer(size, size)
            np.testing.assert_allclose(seen.similarity[s], expected, atol=1e-5)
        assert seen.num_tokens == sum(map(len, inputs[layer_name, 0]))


@torch.no_grad()
def apply(experts, e, tokens, last):
    """An expert from its equation."""
    if experts.name == "adapter":
        if last:
            tokens = experts.ffn.fc2(experts.ffn.fc1(tokens).relu())
        return (tokens @ experts.down_weight[e]).relu() @ experts.up_weight[e]
    w1, b1, w2, b2 = (getattr(experts, name)[e] for name in FFN)
    return (tokens @ w1 + b1).relu() @ w2 + b2


@pytest.mark.parametrize("merge", ["mean", "frequency", "learned"])
def test_the_size_of_batches_does_not_matter(merge, trained, tmp_path):
    source, models, reports = trained("smoe"), [], []
    for tokens in (50, 2000):
        output = tmp_path / f"{tokens}.pt"
        words = ["--merge", merge, "--max-tokens", tokens, "--max-sentences", 25]
        if merge == "learned":
            words += ["--epochs", 3]
        reports.append(convert(source, output, "--strata", "1-2-1-1", *words))
        models.append(model_of(output))
    for one, other in zip(*(report["blocks"] for report in reports)):
        assert one["groups"] == other["groups"] and one["visits"] == other["visits"]
        for this, that in zip(one["strata"], other["strata"]):
            np.testing.assert_allclose(this["similarity"], that["similarity"], atol=1e-5)
    tolerance = 1e-5 if merge == "learned" else 0
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=0, atol=tolerance)


def test_learned_weights_are_better_and_sum_to_1(trained, tmp_path):
    words = ["--experts", 4, "--merge", "learned", "--epochs", 8]
    report = convert(trained("vanilla"), tmp_path / "merged.pt", *words)
    for block in report["blocks"]:
        assert block["error"]["learned"] < 0.95 * block["error"]["equal weights"]
        assert 1 <= block["error"]["epoch"] <= 8
        for weights in block["weights"]:
            assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_sentences_are_dealt_whatever_the_batches(plain):
    def dealt(max_tokens, number):
        text = Text(plain, type("", (Options,), {"max_tokens": max_tokens, "max_sentences": 0}))
        return [
            {
                direction: sorted(np.concatenate(plan).tolist())
                for direction, plan in part._plans.items()
            }
            for part in text.dealt(number)
        ]

    parts = dealt(50, 16)
    assert parts == dealt(3000, 16) and len(parts) == 16
    for direction in toy_task.DIRECTIONS:
        found = [i for part in parts for i in part.get(direction, [])]
        assert sorted(found) == list(range(30))
    sizes = [sum(map(len, part.values())) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(dealt(50, 200)) == 120, "none is empty"


# --------------------------------------------------------------------------------------
# other models


def kill(parameters):
    """Leave alive the experts 1 2 4 of the first stratum, and 4 of the second."""
    for side in ("encoder", "decoder"):
        alive = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0]).bool()
        for i, own in enumerate((alive, alive[6:])):
            parameters[f"{side}.layers.1.expert_block.gates.{i}.alive_E"].copy_(own)


@pytest.mark.parametrize(
    "name, strata",
    [
        ("cmr", "5"),
        ("stacking", "3-4"),
        ("multi-head", "4-1"),
        ("pesc", "2-3"),
        ("xmoe", "3-4"),
        ("xmoe", "2-4"),
    ],
)
def test_other_systems(name, strata, data, tmp_path):
    source = save(tmp_path / "checkpoint.pt", data, *MODELS[name])
    output = tmp_path / "merged.pt"
    learned = ("--merge", "learned", "--epochs", 1, "--max-sentences", 4)
    report = convert(source, output, "--strata", strata, "--align", *learned)
    assert report["strata"]["after"] == strata
    assert torch.isfinite(features(data, output)).all()
    sizes = list(map(int, strata.split("-")))
    for gates in gate_sizes(model_of(output)).values():
        expected = sizes if name == "stacking" else [sum(sizes[i:]) for i in range(len(sizes))]
        assert list(gates) == expected


def test_experts_that_are_not_alive_are_left_out(data, tmp_path):
    """And keep the room that is left."""
    source = save(tmp_path / "checkpoint.pt", data, *MODELS["dynmoe"], change=kill)
    report = convert(source, tmp_path / "merged.pt", "--strata", "4-3", "--align")
    before, after = model_of(source), model_of(tmp_path / "merged.pt")
    for side, block in zip(("encoder", "decoder"), report["blocks"]):
        name = f"{side}.layers.1.expert_block"
        *first, new, other, last = block["groups"]
        assert first == [[1], [2], [4], [3]]
        assert sorted(new + other + last) == [8, 9, 10, 11]
        assert after[f"{name}.gates.0.alive_E"].tolist() == [True] * 3 + [False] + [True] * 3
        assert after[f"{name}.gates.1.alive_E"].all()
        assert after[f"{name}.gates.1.counts"].tolist() == [0] * (1 + 3 + 64)
        rows, threshold = (before[f"{name}.gates.1.{n}"] for n in ("weight", "threshold"))
        for g, members in enumerate((new, other, last)):
            own = [e - 7 for e in members]
            torch.testing.assert_close(after[f"{name}.gates.1.weight"][g], rows[own].mean(0))
            torch.testing.assert_close(
                after[f"{name}.gates.1.threshold"][g], threshold[own].mean(0)
            )
    assert torch.isfinite(features(data, tmp_path / "merged.pt")).all()


def test_parts_are_merged_as_one_file_is(plain, data, tmp_path):
    parted = tmp_path / "parted.pt"
    transform.write_in_parts(read_checkpoint(plain), 4, parted)
    words = ["--strata", "3-2", "--merge", "frequency", "--align"]
    models = []
    for source in (plain, parted):
        convert(source, tmp_path / "merged.pt", *words, "--force")
        models.append(model_of(tmp_path / "merged.pt"))
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    # and the result can be shared again
    run(
        "python",
        "-m",
        "fairseq_smoe",
        "checkpoint",
        "split",
        tmp_path / "merged.pt",
        parted,
        "--parts",
        5,
    )
    assert torch.equal(features(data, parted), features(data, tmp_path / "merged.pt"))


def test_an_old_number_of_processes_is_forgotten(data, tmp_path):
    words = ["--moe-expert-count", 8, "--moe-expert-parallel-size", 8]
    source = save(tmp_path / "checkpoint.pt", data, *map(str, words))
    convert(source, tmp_path / "merged.pt", "--experts", 6, "--similarity", "weights")
    assert torch.isfinite(features(data, tmp_path / "merged.pt")).all()


# --------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "model, words, message",
    [
        ("4-4", ["--strata", "5-4"], "--strata 5-4: .* has 4-4 experts; expected at most as many"),
        ("4-4", ["--strata", "0-4"], "--strata '0-4': expected the number of experts"),
        ("4-4", ["--strata", "3"], "--strata 3: .* has 2 strata, 4-4, whose number stays"),
        ("4-4", ["--experts", "6"], "--experts 6: .* give --strata with 2 numbers"),
        ("4-4", ["--experts", "0"], "--experts 0: expected 1 or more"),
        ("4-4", ["--strata", "2-2", "--subset", "test"], "--subset test: .* fitted to a test set"),
        ("4-4", ["--strata", "2-2", "--subset", "none"], "none"),
        ("4-4", ["--strata", "2-2", "--epochs", "3"], "--epochs 3: needs --merge learned"),
        (
            "4-4",
            ["--strata", "2-2", "--merge", "learned", "--learning-rate", "0"],
            "--learning-rate 0.0: expected more than 0",
        ),
        (
            "dense",
            ["--experts", "2"],
            "is a dense model; merge-experts starts from one with experts",
        ),
        (
            "hmoe",
            ["--experts", "4"],
            "--moe-experts sized; the mean of such experts is not defined",
        ),
        ("mpoe", ["--strata", "2-2"], "--moe-experts tensor-product; the mean of such experts"),
        ("dynmoe", ["--strata", "2-2", "--gate-bias"], "--gate-bias: .* --moe-gate top-any"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_refusals(model, words, message, plain, data, tmp_path):
    source = plain if model == "4-4" else save(tmp_path / "source.pt", data, *MODELS[model])
    output = tmp_path / "output.pt"
    command = ["convert", "merge-experts", str(source), str(output), *words]
    with pytest.raises(SystemExit) as refused:
        main(command)
    text = str(refused.value)
    assert text.startswith("error: ") and "\n" not in text
    assert re.search(message, text)
    assert not output.exists()


def test_one_of_two_sizes_is_needed(plain, tmp_path, capsys):
    for words in ([], ["--experts", "3", "--strata", "3-3"]):
        with pytest.raises(SystemExit):
            main(["convert", "merge-experts", str(plain), str(tmp_path / "output.pt"), *words])
        assert "--strata" in capsys.readouterr().err


def test_a_bias_of_gates(data):
    """Zero at first, so that it changes nothing; it is trained; the gates of DynMoE have none."""
    _, _, plain_model, _ = toy_task.set_up(data, "--smoe-strata", "2-2")
    _, _, model, _ = toy_task.set_up(data, "--smoe-strata", "2-2", "--moe-gate-bias")
    more = model.state_dict().keys() - plain_model.state_dict().keys()
    block = "layers.1.expert_block.gates"
    assert more == {
        f"{side}.{block}.{i}.logit_bias" for side in ("encoder", "decoder") for i in (0, 1)
    }
    for name, tensor in plain_model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    block = expert_layers(model)[0][1].routed_block.eval()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x)[0], expert_layers(plain_model)[0][1].routed_block.eval()(x)[0])
    block(x)[1].balance_loss.backward()
    assert block.gates[0].logit_bias.grad.any()
    with torch.no_grad():
        block.gates[0].logit_bias.copy_(torch.tensor([0.0, 100, 0, 0]))
    assert block(x)[1].gates[0].best_T.tolist() == [1] * 9
    with pytest.raises(OptionError, match="--moe-gate-bias with --moe-gate top-any"):
        toy_task.set_up(data, *MODELS["dynmoe"], "--moe-gate-bias")
    with pytest.raises(OptionError, match="--moe-gate-bias"):
        plain_model.load_state_dict(model.state_dict())


def test_a_folder_is_no_output(plain, tmp_path):
    shutil.copyfile(plain, tmp_path / "copy.pt")
    with pytest.raises(SystemExit, match="is the checkpoint to convert"):
        convert(tmp_path / "copy.pt", tmp_path / "copy.pt", "--strata", "2-2")
