"""``norm="released"`` computes what the authors' released block does, on recordings of that block.

The recordings are not part of the project; without them, ``test_block_properties.py`` holds the
block to the same behaviour through the reference in ``reference.py``.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_smoe.moe.block import SMoEBlock

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
RECORDINGS = sorted(GOLDEN.glob("*.npz"))
TOLERANCE = 2e-5


def as_state_dict(recording, strata, prefix=""):
    """The recording's weights (or with ``prefix="grad."`` gradients) under the block's names."""

    def tensor(name):
        return torch.from_numpy(recording[prefix + name]).double()

    norms = ["norm.entry", *(f"norm.after{i + 1}" for i in range(len(strata)))]
    state = {
        f"norms.{i}.{p}": tensor(f"{n}.{p}")
        for i, n in enumerate(norms)
        for p in ("weight", "bias")
    }
    state |= {f"gates.{i}.weight": tensor(f"gate.{i + 1}.weight") for i in range(len(strata))}
    for layer in ("fc1", "fc2"):
        experts = range(1, sum(strata) + 1)
        weights = [tensor(f"expert.{e}.{layer}.weight").t() for e in experts]
        biases = [tensor(f"expert.{e}.{layer}.bias") for e in experts]
        state[f"experts.{layer}_weight"] = torch.stack(weights)
        state[f"experts.{layer}_bias"] = torch.stack(biases)
    return state


@pytest.mark.skipif(not RECORDINGS, reason=f"no recordings of the authors' block in {GOLDEN}")
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_agrees_with_the_authors_block(path):
    recording = np.load(path)
    strata = tuple(int(n) for n in recording["strata"])
    x = torch.from_numpy(recording["x"]).double().requires_grad_()
    ffn_dim = len(recording["expert.1.fc1.bias"])
    block = SMoEBlock(x.shape[-1], ffn_dim, strata, norm="released").double()
    block.load_state_dict(as_state_dict(recording, strata))
    block.train(bool(recording["training"]))

    y, stats = block(x)
    cotangent = torch.from_numpy(recording["cotangent"]).double()
    num_tokens = x.shape[0] * x.shape[1]
    ((y * cotangent).sum() + 0.01 * stats.balance_loss * num_tokens).backward()

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)

    close(y, torch.from_numpy(recording["y"]).double())
    close(stats.balance_loss, torch.tensor(float(recording["aux_loss"])).double())
    close(x.grad, torch.from_numpy(recording["grad.x"]).double())
    expected = as_state_dict(recording, strata, "grad.")
    assert expected.keys() == dict(block.named_parameters()).keys()
    for name, parameter in block.named_parameters():
        close(parameter.grad, expected[name])
