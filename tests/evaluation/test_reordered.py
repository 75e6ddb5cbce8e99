"""Weights in oneDNN's order."""

import pytest
import torch
import toy_task
from fairseq.search import BeamSearch
from toy_task import random_batch, set_up

from fairseq_smoe.evaluation.lean_beam import LeanBeamModel, LeanBeamSearch
from fairseq_smoe.evaluation.reordered import (
    ReorderedLinear,
    can_reorder,
    reorder,
    rounded_up,
)

pytestmark = pytest.mark.skipif(
    not can_reorder(torch.device("cpu")), reason="not an x86 processor with oneDNN"
)


@pytest.mark.parametrize("shape", [(32, 48), (1, 7), (2000, 64), (512, 2048)])
def test_a_linear_layer(shape):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(3, 11, shape[1])
    for b in (bias, None):
        expected = torch.nn.functional.linear(x, weight, b)
        found = ReorderedLinear(weight, b)(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)
    assert ReorderedLinear(weight, bias)(x[:0]).shape == (0, 11, shape[0])


def test_a_row_does_not_depend_on_how_many_others_there_are():
    torch.manual_seed(1)
    layer, x = ReorderedLinear(torch.randn(96, 64), torch.randn(96)), torch.randn(300, 64)
    everything = layer(x)
    for number in (2, 3, 5, 16, 33, 80, 299):
        assert torch.equal(layer(x[:number]), everything[:number])


def test_joined_layers_compute_the_same_numbers():
    torch.manual_seed(2)
    x = torch.randn(5, 16)
    for bias in (torch.randn(8), None):
        layers = [ReorderedLinear(torch.randn(8, 16), bias) for _ in range(3)]
        joined = ReorderedLinear.joined(layers)
        torch.testing.assert_close(joined(x), torch.cat([f(x) for f in layers], 1))


@pytest.mark.parametrize("name", ["dense", "smoe", "stacking", "cmr", "mpoe"])
def test_a_model_predicts_the_same(name, data):
    _, task, model, _ = set_up(data, *toy_task.MODELS[name])
    model.eval()
    arguments = random_batch(2, task, 20, 6, range(3, 9))["net_input"]
    before = sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        expected = model(**arguments)[0]
        reorder(model)
        found = model(**arguments)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert LeanBeamModel([model])._steps is not None
    # the weights are in memory once, but for the embeddings, which the output shares
    assert sum(p.numel() for p in model.parameters()) < before


def test_other_devices_multiply_as_ever():
    assert not can_reorder(torch.device("meta"))


@pytest.mark.parametrize("step", [0, 3])
def test_search_adds_up_what_fairseq_does(step, data):
    _, task, _, _ = set_up(data)
    generator = torch.Generator().manual_seed(step)
    log_probs = torch.randn(4, 3, 24, generator=generator).log_softmax(-1)
    log_probs[:, :, 1] = -torch.inf
    scores = torch.randn(4, 3, 5, generator=generator)
    theirs = BeamSearch(task.target_dictionary).step(step, log_probs.clone(), scores)
    ours = LeanBeamSearch(task.target_dictionary).step(step, log_probs, scores)
    for expected, found in zip(theirs, ours, strict=True):
        assert torch.equal(expected, found)


def test_numbers_of_rows_are_rounded_to_a_few():
    found = [rounded_up(rows) for rows in range(1, 10001)]
    assert found[:16] == list(range(1, 17))
    assert all(rows <= more <= 1.125 * rows for rows, more in enumerate(found, 1))
    assert len(set(found)) < 100


def test_memory_does_not_grow_with_the_numbers_of_rows():
    """In a process of its own: oneDNN keeps what it has compiled for a number of rows."""
    outcome = toy_task.run("python", "-c", GROWTH, own_process=True)
    assert float(outcome.stdout.split()[-1]) < 60, outcome.stdout


GROWTH = """
import torch
from fairseq_smoe.evaluation.reordered import ReorderedLinear

def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

layer, x = ReorderedLinear(torch.randn(192, 64)), torch.randn(1500, 64)
with torch.inference_mode():
    layer(x)
    before = memory()
    for rows in range(1, 1500):
        layer(x[:rows])
print("MB more:", memory() - before)
"""
