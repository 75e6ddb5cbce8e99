"""What a user asks of fairseq-train beside the model: precision, memory, logs."""

import math

import pytest
import toy_task
from toy_task import DIRECTIONS, Outcome, run, train

ROUTING_METRICS = (
    "moe_gate_loss",
    "overflow_expert1",
    "overflow_expert2",
    "entropy_gating",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "unused_expert1_count",
    "encoder_requested_capacity",
    "decoder_requested_capacity",
)


@pytest.fixture(scope="module")
def plain(short_run):
    """Output of 30 updates without further options."""
    return Outcome([], 0, (short_run / "stdout").read_text(), "")


def train_shortly(data, tmp_path, **options):
    """The same 30 updates, with further options."""
    return train(data, tmp_path, *toy_task.MODELS["smoe"], max_update=30, no_save=True, **options)


@pytest.mark.parametrize(
    "precision", ["amp", "fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16"]
)
def test_precisions_train_on_the_cpu(precision, plain, data, tmp_path):
    losses = train_shortly(data, tmp_path, **{precision: True}).losses()
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses == sorted(losses, reverse=True) and losses[0] != losses[-1]
    assert losses == pytest.approx(plain.losses(), rel=0.05)


def test_update_freq_doubles_the_batch(plain, data, tmp_path):
    doubled = train_shortly(data, tmp_path, update_freq=2)
    sentences, twice = (outcome.log("train_inner")[0]["bsz"] for outcome in (plain, doubled))
    assert twice == pytest.approx(2 * sentences, rel=0.2)
    assert doubled.losses()[-1] < doubled.losses()[0]


def test_checkpoint_activations_changes_no_loss(plain, data, tmp_path):
    """Nor what the routing does, in the printed digits (its gradients: tests/test_model.py)."""
    checkpointed = train_shortly(data, tmp_path, checkpoint_activations=True)
    timeless = ["loss", "nll_loss", "gnorm", *ROUTING_METRICS]
    records = [outcome.log("train_inner")[:2] for outcome in (checkpointed, plain)]
    # of 20 updates: later, gradients summed in another order send the first token another way
    for record, expected in zip(*records, strict=True):
        assert {n: record[n] for n in timeless} == {n: expected[n] for n in timeless}


# --------------------------------------------------------------------------------------
# logs


def test_log_shows_what_the_routing_does(plain):
    train_record, valid_record = plain.log("train")[-1], plain.log("valid")[-1]
    for name in ROUTING_METRICS:
        assert math.isfinite(train_record[f"train_{name}"])
        assert math.isfinite(valid_record[f"valid_{name}"])
    for side in ("encoder", "decoder"):
        assert 1 <= train_record[f"train_{side}_requested_capacity"] <= 4
    # an even load has a balance loss of 1 and ln(E) nats at a gate without preference
    assert 0.99 < train_record["train_moe_gate_loss"] < 8
    assert 0 < train_record["train_entropy_gating"] < math.log(8)
    assert train_record["train_expert1_balance_top"] > train_record["train_expert1_balance_bottom"]
    assert valid_record["valid_overflow_expert1"] == 0, "nothing is dropped outside training"


def test_log_has_a_validation_loss_for_every_direction(plain, text):
    """They average to that of all, weighted by target tokens."""
    record = plain.log("valid")[-1]
    losses = [record[f"valid_nll_loss_{direction}"] for direction in DIRECTIONS]
    assert len(set(losses)) == len(DIRECTIONS)
    tokens = [count_target_tokens(text, direction) for direction in DIRECTIONS]
    mean = sum(loss * n for loss, n in zip(losses, tokens)) / sum(tokens)
    assert record["valid_nll_loss"] == pytest.approx(mean, abs=2e-3)  # printed with 3 digits


def count_target_tokens(text, direction):
    """Words of the validation set, and for every sentence its language token and its end."""
    source, target = direction.split("-")
    pair = "-".join(sorted((source, target), key=toy_task.LANGS.index))
    lines = (text / f"valid.{pair}.{target}").read_text().splitlines()
    return sum(len(line.split()) + 2 for line in lines)


def test_tensorboard_shows_what_the_routing_does(short_run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for part, names in (
        ("train_inner", ROUTING_METRICS),
        ("valid", [*ROUTING_METRICS, *(f"nll_loss_{d}" for d in DIRECTIONS)]),
    ):
        events = accumulator.EventAccumulator(str(short_run / "tensorboard" / part)).Reload()
        for name in names:
            assert math.isfinite(events.Scalars(name)[-1].value), (part, name)
        assert events.Scalars("moe_gate_loss")[-1].step == 30


# --------------------------------------------------------------------------------------
# fairseq-hydra-train


def test_hydra_config_chooses_model_and_criterion(data, tmp_path):
    """The installed fairseq reads --user-dir only after the configuration, hence the + and
    ``_name``; the task ``translation`` is fairseq's own."""
    outcome = run(
        "fairseq-hydra-train",
        *(f"common.user_dir={toy_task.REPOSITORY / 'fairseq_smoe'}", "common.cpu=true"),
        *("common.log_format=json", "common.log_interval=5"),
        *("task=translation", f"task.data={data}", "task.source_lang=en", "task.target_lang=aa"),
        *("+model._name=smoe_transformer", "+model.smoe_strata=2-2"),
        *("+model.encoder_embed_dim=32", "+model.encoder_ffn_embed_dim=64"),
        *("+model.encoder_attention_heads=2", "+model.decoder_attention_heads=2"),
        *("+model.encoder_layers=2", "+model.decoder_layers=2"),
        "criterion=label_smoothed_cross_entropy",
        *("criterion._name=moe_label_smoothed_cross_entropy", "+criterion.moe_gate_loss_wt=0.02"),
        *("optimizer=adam", "lr_scheduler=fixed", "optimization.lr=[0.003]"),
        *("dataset.max_tokens=500", "dataset.num_workers=0", "optimization.max_update=15"),
        *(f"checkpoint.save_dir={tmp_path}", f"hydra.run.dir={tmp_path}"),
    )
    losses = outcome.losses()
    assert len(losses) == 3 and losses[-1] < losses[0]
    record = outcome.log("valid")[-1]
    for name in ROUTING_METRICS:
        assert math.isfinite(record[f"valid_{name}"])
    assert 1 <= record["valid_encoder_requested_capacity"] <= 2

    import torch

    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    assert state["encoder.layers.1.expert_block.experts.fc1_weight"].shape == (4, 32, 64)


@pytest.mark.parametrize("name, warned", [("smoe", True), ("dense", False)])
def test_another_criterion_is_warned_about_once(name, warned, data, tmp_path):
    outcome = toy_task.train(
        data,
        tmp_path,
        *toy_task.MODELS[name],
        criterion="label_smoothed_cross_entropy",
        max_update=2,
        no_save=True,
        disable_validation=True,
    )
    lines = [
        line
        for line in (outcome.stdout + outcome.stderr).splitlines()
        if "--criterion label_smoothed_cross_entropy" in line
    ]
    assert len(lines) == warned
    assert all("--criterion moe_label_smoothed_cross_entropy" in line for line in lines)
