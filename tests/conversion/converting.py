"""``python -m fairseq_smoe convert`` in this process, and what its results compute."""

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fairseq_smoe.__main__ import main

START = "to train it on: fairseq-train ... "


@dataclass
class Converted:
    """What a conversion has left: the checkpoint, its report, and what it printed.

    ``flags`` are the options that it says to train on with.
    """

    path: Path
    report: dict
    lines: list

    @property
    def flags(self):
        assert self.lines[-1].startswith(f"{START}--finetune-from-model {self.path} ")
        return shlex.split(self.lines[-1].removeprefix(START))


def convert(kind, checkpoint, output, *words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["convert", kind, *map(str, (checkpoint, output, *words))])
    report = json.loads(output.with_suffix(".report.json").read_text())
    return Converted(output, report, printed.getvalue().splitlines())


def refusal(kind, checkpoint, output, *words):
    """The line that a conversion ends with, which has written nothing."""
    with pytest.raises(SystemExit) as error:
        convert(kind, checkpoint, output, *words)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not output.exists() and not list(output.parent.glob("*.report.json"))
    return message


def predictions(task, model):
    """``(logits, targets)`` of the test set that ``toy_task.load`` has loaded, with teacher forcing
    and without padding."""
    dataset = task.dataset("test")
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        logits = model(**batch["net_input"])[0]
    real = batch["target"] != task.target_dictionary.pad()
    return logits[real], batch["target"][real]


def loss(logits, targets):
    """Mean negative log-likelihood of a token, in nats."""
    return float(torch.nn.functional.cross_entropy(logits.double(), targets))
