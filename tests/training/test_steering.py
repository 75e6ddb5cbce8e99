"""What decides when the scale of the loss grows survives an interruption. Whole trainings:
test_interrupted.py."""

from types import SimpleNamespace

import pytest
import torch
import toy_task
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.training import steering

OVERFLOWS = st.lists(st.booleans(), min_size=1, max_size=30)


def fairseqs_scales(scaler, overflows):
    """The loss scale after every update."""
    for overflow in overflows:
        try:
            scaler.check_overflow(float("inf") if overflow else 1.0)
            scaler.update()
        except OverflowError:
            pass
        yield scaler.loss_scale


def torchs_scales(scaler, overflows):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0)
    for overflow in overflows:
        weight.grad = scaler.scale(torch.tensor([float("inf") if overflow else 1.0]))
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale()


def new_fairseqs():
    return DynamicLossScaler(2.0**10, scale_window=4, tolerance=0.3, min_loss_scale=0)


def new_torchs():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)


@pytest.mark.parametrize(
    "new, scales", [(new_fairseqs, fairseqs_scales), (new_torchs, torchs_scales)]
)
@settings(deadline=None)
@given(before=OVERFLOWS, after=OVERFLOWS)
def test_the_loss_scale_goes_on_as_if_uninterrupted(new, scales, before, after):
    uncut, cut, resumed = (SimpleNamespace(scaler=new()) for _ in range(3))
    expected = list(scales(uncut.scaler, before + after))
    begun = list(scales(cut.scaler, before))
    steering.restore_scaler(resumed, steering.scaler_state(cut))
    if new is new_fairseqs:  # which fairseq restores
        resumed.scaler.loss_scale = cut.scaler.loss_scale
    assert begun + list(scales(resumed.scaler, after)) == expected


def test_a_loss_scale_of_the_other_precision_begins_anew():
    for one, other in ((new_fairseqs, new_torchs), (new_torchs, new_fairseqs)):
        found, fresh = SimpleNamespace(scaler=one()), SimpleNamespace(scaler=one())
        steering.restore_scaler(found, steering.scaler_state(SimpleNamespace(scaler=other())))
        steering.restore_scaler(found, steering.scaler_state(SimpleNamespace()))
        assert steering.scaler_state(found) == steering.scaler_state(fresh)


# --------------------------------------------------------------------------------------
# what begins anew

OPTIONS = {
    "lang_pairs": "en-aa",
    "max_tokens": 5500,
    "lr": 1e-9,
    "lr_scheduler": "fixed",
    "warmup_updates": None,
    "total_num_update": None,
    "encoder_embed_dim": 16,
    "patience": 2,
}


@pytest.fixture(scope="module")
def ended(make_once, data):
    """A training that --patience has ended after its third epoch."""

    def make(folder):
        outcome = toy_task.train(data, folder, **OPTIONS, max_epoch=9)
        assert [record["epoch"] for record in outcome.log("valid")] == [1, 2, 3]

    return make_once("ended-by-patience", make)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"reset_meters": True}, ""),
        ({"best_checkpoint_metric": "nll_loss"}, "--best-checkpoint-metric: not as before"),
        pytest.param({"reset_optimizer": True}, "", marks=pytest.mark.slow),
    ],
)
def test_patience_begins_anew(options, said, ended, data, tmp_path):
    """With another score, or where the user says so."""
    last = ended / "checkpoint_last.pt"
    outcome = toy_task.train(
        data, tmp_path, **{**OPTIONS, **options}, restore_file=last, max_epoch=9
    )
    assert [record["epoch"] for record in outcome.log("valid")] == [4, 5, 6]
    first, *others = outcome.log("valid")
    metric = options.get("best_checkpoint_metric", "loss")
    assert f"valid_best_{metric}" not in first and f"valid_best_{metric}" in others[0]
    assert said in outcome.stdout


def test_more_patience_goes_on(ended, data, tmp_path):
    options = {**OPTIONS, "patience": 3, "restore_file": ended / "checkpoint_last.pt"}
    outcome = toy_task.train(data, tmp_path, **options, max_epoch=9)
    assert [record["epoch"] for record in outcome.log("valid")] == [4]


def test_finetuning_has_its_own_time_and_patience(ended, data, tmp_path):
    """The model has been trained for longer than its fine-tuning may take."""
    state = torch.load(ended / "checkpoint_last.pt", weights_only=False)
    state["extra_state"]["previous_training_time"] = 36000.0
    torch.save(state, tmp_path / "model.pt")
    options = {**OPTIONS, "stop_time_hours": 5, "finetune_from_model": tmp_path / "model.pt"}
    outcome = toy_task.train(data, tmp_path / "run", **options, max_epoch=9)
    assert [record["epoch"] for record in outcome.log("valid")] == [1, 2, 3]
    options |= {"finetune_from_model": None, "restore_file": tmp_path / "model.pt", "patience": 9}
    outcome = toy_task.train(data, tmp_path / "other", **options, max_epoch=9)
    assert "has ended before, because of --stop-time-hours 5" in outcome.stdout
