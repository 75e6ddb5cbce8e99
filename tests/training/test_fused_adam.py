"""--optimizer fused_adam: the updates and the checkpoints of fairseq's adam."""

import copy

import pytest
import torch
import toy_task
from fairseq.optim.adam import Adam, FairseqAdamConfig

from fairseq_smoe.errors import OptionError
from fairseq_smoe.training.fused_adam import FairseqFusedAdam, FusedAdam

MODEL = ["--smoe-strata", "2-2"]
ADAM = {"adam_betas": "(0.9, 0.98)", "weight_decay": 0.1, "lr": 0.01}


def make_parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (7,), (5, 3), (64, 33), (2, 3, 4), (0,)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in (*made, made[3].t())]  # one is transposed


def run(optimizer, updates, seed=0):
    """Steps with random gradients, some of which are missing, or ordered otherwise in memory."""
    generator = torch.Generator().manual_seed(seed)
    parameters = optimizer.param_groups[0]["params"]
    for update in updates:
        for number, parameter in enumerate(parameters):
            value = 0.1 ** (number % 4) * torch.randn(parameter.shape, generator=generator)
            value = value.to(parameter.dtype)
            parameter.grad = None if (update + number) % 5 == 0 else value
            if number == 4 and update % 2 and parameter.grad is not None:
                parameter.grad = value.t().contiguous().t()
        optimizer.step()
    return parameters


# of the smallest gradients, eps is as great as the moments
@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_adam(eps, decay, dtype):
    options = {"lr": 0.01, "betas": (0.9, 0.98), "eps": eps, "weight_decay": decay}
    stock, ours = (kind(make_parameters(dtype), **options) for kind in (Adam, FusedAdam))
    for _ in range(3):
        pairs = list(zip(run(stock, range(10)), run(ours, range(10))))
        for expected, found in pairs:
            # a rounding of half precision may go the other way
            tolerance = {"rtol": 0.01, "atol": 1e-3} if dtype == torch.bfloat16 else {}
            torch.testing.assert_close(found, expected, **tolerance)
            assert_same_state(ours.state[found], stock.state[expected])
        if dtype == torch.float32:  # fairseq's own wrapper restores moments of half precision
            # go on from each other's state
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (ours, stock)]
            stock.load_state_dict(states[0]), ours.load_state_dict(states[1])


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert ours["step"] == theirs["step"] and isinstance(ours["step"], int)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], theirs[name])


def test_steps_that_apex_has_counted_in_the_group():
    ours = FusedAdam(make_parameters())
    run(ours, range(1, 4))
    state = ours.state_dict()
    for entries in state["state"].values():
        del entries["step"]
    state["param_groups"][0]["step"] = 7
    ours.load_state_dict(state)
    parameters = run(ours, [5])
    assert {ours.state[p]["step"] for p in parameters if p.grad is not None} == {8}


# --------------------------------------------------------------------------------------
# in a training


def make_trainer(data, optimizer, *more):
    from fairseq_smoe.training.trainer import SMoETrainer

    options = {**ADAM, "clip_norm": 0.5, "optimizer": optimizer}
    cfg, *built = toy_task.set_up(data, *MODEL, *more, **options)
    for part in (cfg.common, cfg.distributed_training):
        part.tpu = False  # fairseq's choice for --bf16 without a GPU
    return SMoETrainer(cfg, *built)


def train(trainer, update):
    """One update, in turns of one batch and of two."""
    numbers = [2 * update, 2 * update + 1][: 1 + update % 2]
    trainer.train_step([toy_task.random_batch(n, trainer.task, 8, 4, range(2, 5)) for n in numbers])


@pytest.mark.parametrize(
    "updates, more",
    [
        (21, []),
        (3, ["--train-only", "experts,embed_tokens[5:],layer_norm", "--weight-decay", "0"]),
        (9, ["--moe-gate", "top-any", "--dyn-update-interval", "8", "--dyn-record-interval", "3"]),
        (3, ["--bf16"]),
    ],
)
def test_a_training_is_that_of_adam(updates, more, data):
    """With clipped gradients."""
    stock, ours = (make_trainer(data, kind, *more) for kind in ("adam", "fused_adam"))
    for update in range(updates):
        train(stock, update), train(ours, update)
        for (name, expected), found in zip(stock.model.named_parameters(), ours.model.parameters()):
            # a rounding of half precision may go the other way
            tolerance = {"rtol": 0.01, "atol": 1e-3} if "--bf16" in more else {"atol": 1e-6}
            torch.testing.assert_close(found, expected, **{"rtol": 0, **tolerance}, msg=name)
            # the next begins alike. Of a gradient close to 0, Adam makes a change as great as of
            # any other, so that what rounding does to it would add up
            found.data.copy_(expected)
    for expected, found in zip(stock.optimizer.params, ours.optimizer.params):
        states = (trainer.optimizer.optimizer.state for trainer in (ours, stock))
        assert_same_state(next(states)[found], next(states)[expected])


def test_each_goes_on_from_checkpoints_of_the_other(data, tmp_path):
    before, path = make_trainer(data, "adam"), str(tmp_path / "checkpoint.pt")
    for update in range(2):
        train(before, update)
    for update, kind in ((2, "fused_adam"), (3, "adam")):
        before.consolidate_optimizer()
        iterator = {"epoch": 1, "iterations_in_epoch": update}
        before.save_checkpoint(path, {"train_iterator": iterator, "val_loss": None})
        after = make_trainer(data, kind)
        after.load_checkpoint(path)
        assert after.get_num_updates() == update
        train(before, update), train(after, update)
        pairs = zip(before.model.named_parameters(), after.model.parameters())
        for (name, expected), found in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=name)
        before = after


@pytest.mark.parametrize("option", ["--use-old-adam", "--fp16-adam-stats"])
def test_options_of_another_adam_are_refused(option):
    cfg = FairseqAdamConfig(**{option[2:].replace("-", "_"): True})
    with pytest.raises(OptionError, match=f"^{option} with --optimizer fused_adam: not possible"):
        FairseqFusedAdam(cfg, make_parameters())
