"""A gate of the user's own, from the page that shows how, and what a checkpoint may import."""

import re
import shlex
import shutil

import pytest
import torch
import toy_task
from toy_task import run

PAGE = toy_task.REPOSITORY / "docs" / "extend.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def words(command, **paths):
    """A command of the page, for folders of the test."""
    command = command.replace("\\\n", " ").replace('"$(python -m fairseq_smoe path)"', "PLUGIN")
    paths = {"PLUGIN": toy_task.REPOSITORY / "fairseq_smoe", **paths}
    return [str(paths.get(word, word)) for word in shlex.split(command)]


@pytest.fixture(scope="session")
def page(make_once, data):
    """A folder with the page's gate in ``margin_gate.py`` and what its training leaves."""

    def make(folder):
        (gate,) = blocks("python")
        (folder / "margin_gate.py").write_text(gate)
        train, _ = blocks("sh")
        outcome = run(*words(train, **{"data-bin": data}), cwd=folder)
        (folder / "stdout").write_text(outcome.stdout + outcome.stderr)

    return make_once("own-gate", make)


def generate(page, data, *more, check=True):
    """The page's second command, with its ``--moe-modules`` replaced by ``more``."""
    command = words(blocks("sh")[1], **{"data-bin": data})
    at = command.index("--moe-modules")
    command[at : at + 2] = more
    return toy_task.Translations.read(run(*command, cwd=page, check=check))


def test_the_gate_of_the_page_learns_to_translate(page, data):
    assert generate(page, data, "--moe-modules", "margin_gate").bleu > 90


def test_its_loss_and_its_options_are_known(page):
    log = toy_task.Outcome([], 0, (page / "stdout").read_text(), "").log("train_inner")
    assert all(0 < record["gate_entropy"] < 2.1 for record in log)  # log(8) nats at the most
    assert all(record["moe_gate_loss"] >= 0.5 for record in log)
    model = torch.load(page / "checkpoints" / "checkpoint_last.pt", weights_only=False)["cfg"][
        "model"
    ]
    assert (model["moe_gate"], model["gate_margin"]) == ("margin_gate:MarginGate", 0.6)


def test_a_wrong_value_of_an_own_option(page, data):
    train = words(blocks("sh")[0], **{"data-bin": data})
    train[train.index("0.6")] = "1.5"
    outcome = run(*train, cwd=page, check=False)
    assert outcome.returncode == 1
    assert "--gate-margin 1.5: expected more than 0, at most 1" in outcome.stderr


def test_a_checkpoint_imports_nothing(page, data, tmp_path):
    shutil.copytree(page, tmp_path, dirs_exist_ok=True)
    trace = tmp_path / "imported"
    for name in ("margin_gate", "other"):
        path = tmp_path / f"{name}.py"
        text = path.read_text() if path.exists() else ""
        path.write_text(f"open({str(trace)!r}, 'a').write('{name} ')\n{text}")
    outcome = generate(tmp_path, data, check=False)
    assert outcome.returncode == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert "--moe-gate margin_gate:MarginGate" in last and "--moe-modules margin_gate" in last
    assert not trace.exists()
    generate(tmp_path, data, "--moe-modules", "margin_gate")
    assert trace.read_text() == "margin_gate "


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--moe-gate", "best"], ["--moe-gate best", "top-k", "module:Class"]),
        (["--moe-gate", "no_such:Gate"], ["--moe-gate no_such", "cannot be imported"]),
        (["--moe-experts", "json:JSONDecoder"], ["--moe-experts json:JSONDecoder", "Experts"]),
        (["--moe-arrangement", "nested"], ["--moe-arrangement nested", "cmr", "stacking"]),
    ],
)
def test_wrong_names_in_one_line(options, parts, data, tmp_path):
    outcome = toy_task.train(data, tmp_path, *options, check=False)
    assert outcome.returncode == 1
    lines = outcome.stderr.strip().splitlines()
    assert all(part in lines[-1] for part in parts), outcome.tail()
    assert "Traceback" not in outcome.stderr


def test_an_option_that_is_taken(data, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from fairseq_smoe.moe.gates.top_k import TopKGate, TopKOptions\n"
        "from fairseq_smoe.moe.kind import option\n"
        "@dataclass\n"
        "class Options(TopKOptions):\n"
        "    dropout: float = option(0.5, 'of gates')\n"
        "class Gate(TopKGate):\n"
        "    Options = Options\n"
    )
    command = toy_task.train_command(data, tmp_path, "--moe-gate", "mine:Gate")
    command[command.index("fairseq_smoe")] = toy_task.REPOSITORY / "fairseq_smoe"
    outcome = run(*command, cwd=tmp_path, check=False)
    assert outcome.returncode == 1
    assert "mine:Options: --dropout is an option of fairseq's transformer" in outcome.stderr
