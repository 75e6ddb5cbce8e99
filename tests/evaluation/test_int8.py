"""Weights in 8 bits."""

import pytest
import torch
import toy_task
from toy_task import random_batch, set_up

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.int8 import Int8Linear, quantise
from fairseq_smoe.evaluation.lean_beam import LeanBeamModel


def test_a_linear_layer_is_off_by_rounding():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(10, 64)
    weight[7] = 0
    layer = Int8Linear(weight, bias)
    expected = x @ weight.t() + bias
    # a step of the weights times the inputs, and a step of the inputs times the weights
    steps = weight.abs().amax(1) / 127, (x.max() - x.min()) / 255
    bound = x.abs().sum(1)[:, None] * steps[0] / 2 + steps[1] * weight.abs().sum(1) / 2
    found = layer(x)
    assert ((found - expected).abs() <= 1.5 * bound + 1e-4).all()
    assert (found - expected).abs().max() > 0
    torch.testing.assert_close(found[:, 7], bias[7].expand(10), rtol=0, atol=1e-6)


def test_joined_layers_compute_the_same_numbers():
    torch.manual_seed(1)
    layers = [Int8Linear(torch.randn(8, 16), torch.randn(8)) for _ in range(3)]
    x = torch.randn(5, 16)
    torch.testing.assert_close(
        Int8Linear.joined(layers)(x), torch.cat([f(x) for f in layers], 1), rtol=0, atol=1e-5
    )
    bare = [Int8Linear(torch.randn(8, 16)) for _ in range(2)]
    assert Int8Linear.joined(bare)(x).shape == (5, 16)


@pytest.mark.parametrize("name", ["dense", "smoe", "stacking", "cmr"])
def test_a_model_predicts_nearly_the_same_in_less_memory(name, data):
    _, task, model, _ = set_up(data, *toy_task.MODELS[name])
    model.eval()
    sample = random_batch(2, task, 20, 6, range(3, 9))
    arguments = sample["net_input"]
    linears = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    with torch.inference_mode():
        expected = model(**arguments)[0].log_softmax(-1)
        quantise(model)
        found = model(**arguments)[0].log_softmax(-1)
    assert (found - expected).abs().mean() < 0.05
    left = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert left < 0.15 * linears  # of LayerNorms and gates
    assert LeanBeamModel([model])._steps is not None


def test_other_experts_are_refused(data):
    _, _, model, _ = set_up(data, *toy_task.MODELS["mpoe"])
    with pytest.raises(OptionError, match="dtype int8: works with --moe-experts ffn only"):
        quantise(model.eval())
