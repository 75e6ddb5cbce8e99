"""Systems whose experts are shared by processes, by the real commands, against one process."""

import pytest
import torch
import toy_task
from test_expert_parallel import losses, merged, train


@pytest.mark.parametrize(
    "name, processes, more",
    [
        ("mpoe", 2, ["--mpo-share", "stratum", "--mpo-central-mask-prob", "0.5"]),
        ("pesc", 2, []),
        pytest.param("mpoe", 2, ["--ddp-backend", "legacy_ddp"], marks=pytest.mark.slow),
        pytest.param("pesc", 4, ["--pesc-freeze", "backbone"], marks=pytest.mark.slow),
        pytest.param("pesc", 2, ["--checkpoint-activations"], marks=pytest.mark.slow),
        pytest.param(
            "mpoe",
            2,
            ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "1"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "pesc",
            2,
            ["--ddp-backend", "fully_sharded", "--min-params-to-wrap", "1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_train_the_model_that_one_trains(name, processes, more, data, tmp_path):
    """20 updates, over the end of an epoch: losses, and all parameters."""
    words = [*toy_task.MODELS[name], *more]
    alone = [*toy_task.MODELS[name], *(more if more[:1] != ["--ddp-backend"] else [])]
    expected = losses(train(data, tmp_path / "one", 1, *alone, update_freq=4))
    steps = 4 // processes
    found = train(data, tmp_path / "many", processes, *words, update_freq=steps)
    assert losses(found) == pytest.approx(expected, abs=1e-5)
    reference = torch.load(tmp_path / "one" / "checkpoint_last.pt", weights_only=False)["model"]
    trained = merged(tmp_path / "many")["model"]
    assert trained.keys() == reference.keys()
    for parameter, tensor in reference.items():
        torch.testing.assert_close(trained[parameter], tensor, rtol=0, atol=1e-5, msg=parameter)
