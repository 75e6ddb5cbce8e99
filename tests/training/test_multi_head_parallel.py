"""MH-MoE in two processes that share experts, by the real commands, against one process."""

import pytest
import torch
from test_expert_parallel import losses, merged, train

MODEL = ("--smoe-strata", "2-2", "--moe-heads", "4", "--moe-ffn-dim", "64")


def test_two_processes_train_the_model_that_one_trains(data, tmp_path):
    """20 updates; the two compute activations again."""
    alone = losses(train(data, tmp_path / "one", 1, *MODEL, update_freq=2))
    options = {"moe_expert_parallel_size": 2, "checkpoint_activations": True}
    together = losses(train(data, tmp_path / "two", 2, *MODEL, **options))
    assert len(alone) == 20 and together == pytest.approx(alone, abs=1e-5)
    reference = torch.load(tmp_path / "one" / "checkpoint_last.pt", weights_only=False)["model"]
    trained = merged(tmp_path / "two")["model"]
    assert trained.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-5, msg=name)
