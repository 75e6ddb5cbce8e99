"""Train and translate through fairseq's commands: every row of the paper's tables learns."""

import json
import re

import pytest
import toy_task
from toy_task import generate, interactive, run


def both_directions(text, lang):
    """``(source lines, reference lines)`` of the test set en-``lang``."""
    return [(text / f"test.en-{lang}.{side}").read_text().splitlines() for side in ("en", lang)]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("dense", "vanilla", "smoe") else pytest.param(name, marks=pytest.mark.slow)
        for name in toy_task.MODELS
    ],
)
def test_learns_the_toy_task_and_translates_it(name, data, trained):
    """BLEU of the hardest direction, in which the order of the words turns round."""
    assert generate(data, trained(name), "en-aa", scoring="sacrebleu").bleu > 90


def test_the_language_token_decides_the_target_language(data, text, trained):
    """Same source language, two target languages, one model."""
    sources, _ = both_directions(text, "aa")
    translations = interactive(data, trained("smoe"), sources[:10], "en-bb").sentences
    expected = [source.replace("en", "bb") for source in sources[:10]]
    found = [translations[i][1] for i in range(10)]
    assert all(word.startswith("bb") for line in found for word in line.split())
    assert sum(line == right for line, right in zip(found, expected)) >= 7


def test_interactive_translates_as_generate_does(data, text, trained):
    sources, _ = both_directions(text, "aa")
    from_generate = generate(data, trained("smoe"), "en-aa").sentences
    from_interactive = interactive(data, trained("smoe"), sources[:10], "en-aa").sentences
    assert len(from_generate) == len(sources) and len(from_interactive) == 10
    for i, (score, translation) in from_interactive.items():
        assert translation == from_generate[i][1]
        assert score == pytest.approx(from_generate[i][0], abs=1e-5)


@pytest.mark.parametrize("name", ["smoe", "switch", "cmr", "xmoe", "hmoe", "dynmoe", "multi-head"])
def test_translation_does_not_depend_on_the_batch(name, data, trained):
    """One sentence at a time, without padding, or all of them in one padded batch."""
    alone = generate(data, trained(name), "en-aa", batch_size=1).sentences
    together = generate(data, trained(name), "en-aa", max_tokens=10000).sentences
    assert alone.keys() == together.keys()
    for i in alone:
        assert alone[i][1] == together[i][1]
        assert alone[i][0] == pytest.approx(together[i][0], abs=1e-5)


def test_the_threshold_can_be_changed_for_translation(data, trained):
    """--model-overrides, as text or as a number; more experts give other scores."""
    found = [
        generate(data, trained("xmoe"), "en-aa", model_overrides=overrides).sentences
        for overrides in (None, "{'moe_threshold': '0.9,0.5'}", "{'moe_threshold': 1.0}")
    ]
    assert found[0] == found[1]
    assert found[0].keys() == found[2].keys()
    assert all(found[0][i][0] != found[2][i][0] for i in found[0])


@pytest.mark.parametrize("name, strata", [("smoe", 4), ("multi-head", 2)])
def test_requested_capacity_of_a_translation(name, strata, data, trained, tmp_path):
    """--requested-capacity-file: between 1 and the number of strata, for every expert layer."""
    file = tmp_path / "capacity.json"
    generate(data, trained(name), "en-aa", requested_capacity_file=file)
    capacity = json.loads(file.read_text())
    assert capacity["direction"] == "en-aa"
    assert capacity["sentences"] == toy_task.SPLIT_SIZES["test"]
    assert capacity["layers"].keys() == {"encoder.layers.1", "decoder.layers.1"}
    for passes in (capacity["encoder"], capacity["decoder"], *capacity["layers"].values()):
        assert 1 <= passes <= strata
    assert capacity["encoder"] == capacity["layers"]["encoder.layers.1"]


# --------------------------------------------------------------------------------------
# the commands of README.md, as they stand there


def readme_commands():
    """``{fairseq-train: command, ...}``: the first indented block of README.md with each."""
    text = (toy_task.REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    commands = {}
    for block in blocks:
        for name in re.findall(r"fairseq-(?:train|generate|validate)", block):
            commands.setdefault(name, " ".join(block.replace("\\\n", " ").split()))
    return commands


def on_the_toy_task(command, data, save_dir):
    """A command of the README, with the toy task's data, a tiny model, and no GPU."""
    for old, new in {
        "--fp16": "",
        "data-bin --user-dir": f"{data} --user-dir",
        "--user-dir": "--cpu --user-dir",
        "checkpoints/checkpoint_best.pt": f"{save_dir}/checkpoint_best.pt",
        "--save-dir checkpoints": f"--save-dir {save_dir}",
        "--tensorboard-logdir logs": f"--tensorboard-logdir {save_dir}/logs",
        "capacity.en-de.json": f"{save_dir}/capacity.json",
        "--arch smoe_transformer ": "--arch smoe_transformer_tiny ",
        "--max-update 100000": "--max-update 5",
        "en-de,de-en,en-nl,nl-en": ",".join(toy_task.DIRECTIONS),
        "--target-lang de": "--target-lang aa",
    }.items():
        command = command.replace(old, new)
    return command


def test_commands_of_the_readme(data, tmp_path):
    printed = {}
    commands = readme_commands()
    assert len(commands) == 3
    for name, command in commands.items():
        outcome = run("bash", "-c", on_the_toy_task(command, data, tmp_path))
        printed[name] = outcome.stdout + outcome.stderr
    assert (tmp_path / "checkpoint_last.pt").exists()
    assert "BLEU = " in printed["fairseq-generate"]
    assert json.loads((tmp_path / "capacity.json").read_text())["direction"] == "en-aa"
    for direction in toy_task.DIRECTIONS:
        assert f"nll_loss_{direction}" in printed["fairseq-validate"]
