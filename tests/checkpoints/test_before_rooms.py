"""Checkpoints of the version before gates and experts had doors: they load, and do what they did.

``before_rooms/expected.json`` holds what that version made of them on the toy task: the translations of
the test set, and the loss of a training batch, with its random numbers.
"""

import json
from pathlib import Path

import pytest
import torch
from toy_task import generate, set_up

FOLDER = Path(__file__).parent / "before_rooms"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_same_translations(name, data):
    found = generate(data, FOLDER / f"{name}.pt").sentences
    expected = EXPECTED[name]["translations"]
    assert [found[i][1] for i in range(60)] == [text for _, text in expected]
    assert [found[i][0] for i in range(60)] == pytest.approx([score for score, _ in expected], 1e-4)


@pytest.mark.parametrize("name", EXPECTED)
def test_same_training_loss(name, data):
    from fairseq import checkpoint_utils

    _, task, _, criterion = set_up(data)
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(FOLDER / f"{name}.pt")], arg_overrides={"data": str(data)}, task=task
    )
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    batch = dataset.collater([dataset[i] for i in range(40)])
    torch.manual_seed(0)  # for the second experts, and the tokens that bypass the experts
    loss, _, _ = criterion(model.train(), batch)
    assert loss.item() == pytest.approx(EXPECTED[name]["training_loss"], 1e-5)
