"""Training some parameters, or some of their rows."""

import re

import pytest
import torch
import toy_task
from toy_task import random_batch, set_up

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.train_only import parse_train_only, train_only


def parameters(path):
    return torch.load(path, weights_only=False)["model"]


def test_words_are_parsed():
    assert parse_train_only("gates, embed_tokens[20:]") == {"gates": 0, "embed_tokens": 20}
    for text in ("", "gates,", "a[3]", "a[:3]", "a b"):
        with pytest.raises(OptionError, match="expected a part of a parameter's name"):
            parse_train_only(text)


def test_gradients_of_chosen_parameters_and_rows_are_those_of_all(data):
    gradients = []
    for words in ((), ("--train-only", "gates,fc1[3:],embed_tokens[10:]")):
        torch.manual_seed(4)
        _, task, model, criterion = set_up(data, *toy_task.MODELS["smoe"], *words)
        torch.manual_seed(5)
        loss, *_ = criterion(model.train(), random_batch(3, task, 20, 6, range(3, 9)))
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    everything, some = gradients
    for name, gradient in some.items():
        start = {"fc1": 3, "embed_tokens": 10}.get(
            next((word for word in ("fc1", "embed_tokens") if word in name), None), 0
        )
        if not any(word in name for word in ("gates", "fc1", "embed_tokens")):
            assert gradient is None
            continue
        assert not gradient[:start].any()
        assert torch.equal(gradient[start:], everything[name][start:])


def test_training_leaves_the_rest_as_it_was(data, tmp_path):
    options = dict(max_update=12, warmup_updates=2)
    toy_task.train(data, tmp_path / "a", *toy_task.MODELS["smoe"], **options)
    first = tmp_path / "a" / "checkpoint_last.pt"
    words = ("--finetune-from-model", first, "--train-only", "gates,embed_tokens[14:]")
    toy_task.train(data, tmp_path / "b", *toy_task.MODELS["smoe"], *words, **options)
    before, after = parameters(first), parameters(tmp_path / "b" / "checkpoint_last.pt")
    for name, tensor in after.items():
        if "gates" in name:
            assert not torch.equal(tensor, before[name])
        elif "embed_tokens" in name or "output_projection" in name:
            assert torch.equal(tensor[:14], before[name][:14])
            assert not torch.equal(tensor[14:], before[name][14:])
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "words, message",
    [
        (("--train-only", "gate:"), "--train-only gate:: expected a part of"),
        (("--train-only", "nothing"), "--train-only nothing: is in no parameter's name"),
        (("--train-only", "embed_tokens[999:]"), r"--train-only embed_tokens\[999:\]: .* rows"),
        (
            ("--train-only", "embed_tokens[9:]", "--weight-decay", "0.1"),
            "--weight-decay 0.1 with --train-only",
        ),
        (("--untrained-tokens", "-1"), "--untrained-tokens -1: expected 0 or more"),
    ],
)
def test_mistakes_are_told(words, message, data, tmp_path):
    outcome = toy_task.train(data, tmp_path, *words, max_update=1, check=False)
    assert outcome.returncode != 0
    assert re.search(message, outcome.stderr + outcome.stdout), outcome.tail()


def test_untrained_tokens_are_never_chosen(data):
    _, task, model, _ = set_up(data, *toy_task.MODELS["dense"], "--untrained-tokens", "3")
    with torch.inference_mode():
        logits = model.eval()(**random_batch(3, task, 20, 6, range(3, 9))["net_input"])[0]
    assert torch.isinf(logits[..., -3:]).all() and torch.isfinite(logits[..., :-3]).all()


def test_a_row_that_is_not_there(data):
    _, _, model, _ = set_up(data, *toy_task.MODELS["dense"])
    with pytest.raises(OptionError, match="give fewer"):
        train_only(model, "fc1[100000:]")
