"""Whatever ends or steers a training does so at the same update if the training is interrupted, by
a signal on which it saves or by one that kills it, and goes on."""

import signal

import pytest
import torch
from fork_server import INTERRUPTED
from toy_task import run, train, train_command

from fairseq_smoe.checkpoints.parts import read_checkpoint

# an epoch of 3 updates; saved and validated are every second update, and the end of an epoch
SMALL = {
    "lang_pairs": "en-aa",
    "max_tokens": 5500,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 16,
    "smoe_strata": "2-2",
    "lr_scheduler": "fixed",
    "warmup_updates": None,
    "total_num_update": None,
    "save_interval_updates": 2,
    "log_interval": 1,
    "max_epoch": 5,
}
CUTS = [
    ("SIGTERM", 3),  # where an epoch ends, before it is validated
    ("SIGKILL", 5),  # after a save within an epoch
    ("SIGKILL", 7),  # after the end of an epoch
]
BEFORE_VALIDATION = ("SIGTERM", 4)  # within an epoch
# losses do not change: no validation is better than the first
STILL = {"lr": 1e-9}
PLATEAU = {"lr_scheduler": "reduce_lr_on_plateau", "lr_shrink": 0.5, "lr": 1e-7}
# options -> last update of the training
CASES = {
    "patience": ({"patience": 5, **STILL}, 9),
    "plateau": ({**PLATEAU, "lr_patience": 1, "save_interval_updates": 0}, 15),
}
MORE_CASES = {
    "patience of a score that should grow": (
        {"patience": 4, "maximize_best_checkpoint_metric": True, "lr": 1e-3},
        8,
    ),
    "lowest learning rate": ({**PLATEAU, "stop_min_lr": 2.6e-8}, 9),
    "plateau of a score that should grow": (
        {**PLATEAU, "lr_patience": 1, "maximize_best_checkpoint_metric": True, "lr": 1e-3},
        15,
    ),
    "plateau after warmup": ({**PLATEAU, "warmup_updates": 4}, 15),
    "annealing by epoch": ({"lr": "5e-3,1e-3", "force_anneal": 2, "stop_min_lr": 2e-6}, 12),
    "polynomial_decay": ({"lr_scheduler": "polynomial_decay", "total_num_update": 12}, 15),
    "inverse_sqrt": ({"lr_scheduler": "inverse_sqrt", "warmup_updates": 4}, 15),
    "cosine": ({"lr_scheduler": "cosine", "lr_period_updates": 4}, 15),
    "triangular": ({"lr_scheduler": "triangular", "lr_period_updates": 4, "max_lr": 0.01}, 15),
    "tri_stage": ({"lr_scheduler": "tri_stage", "phase_ratio": "(0.2,0.4,0.4)"}, 14),
    "best checkpoints": ({"keep_best_checkpoints": 2, "lr": 0.05}, 15),
    "best checkpoints of another score": (
        {
            "keep_best_checkpoints": 2,
            "best_checkpoint_metric": "nll_loss",
            "maximize_best_checkpoint_metric": True,
        },
        15,
    ),
    "last epochs": ({"no_epoch_checkpoints": False, "keep_last_epochs": 2}, 15),
    "last updates": ({"keep_interval_updates": 2}, 15),
    "updates by pattern": ({"keep_interval_updates": 1, "keep_interval_updates_pattern": 4}, 15),
    "late validation": ({"validate_after_updates": 6, "patience": 4, **STILL}, 12),
    "rare validation": (
        {"validate_interval": 2, "save_interval_updates": 0, "patience": 1, **STILL},
        12,
    ),
    "validation between saves": (
        {"validate_interval_updates": 1, "save_interval_updates": 5, "patience": 9, **STILL},
        10,
    ),
    "most updates": ({"max_update": 8, "max_epoch": None}, 8),
    "curriculum": ({"curriculum": 2}, 15),
    "update frequency by epoch": ({"update_freq": "1,2,1"}, 14),
    "new batches every epoch": ({"update_epoch_batch_itr": "True"}, 15),
    "order by epoch": ({"update_ordered_indices_seed": True, "grouped_shuffling": True}, 15),
    "mean of the weights": ({"store_ema": True, "ema_update_freq": 2, "ema_decay": 0.5}, 15),
}


def words(folder, options):
    tri_stage = {"max_update": 14} if options.get("lr_scheduler") == "tri_stage" else {}
    return {**SMALL, **tri_stage, **options, "save_dir": folder}


def steps(*outcomes):
    """What was logged of every update and validation; a later run corrects an earlier."""
    found = {}
    for outcome in outcomes:
        for kind in ("train_inner", "valid"):
            for record in outcome.log(kind):
                kept = {
                    name: value
                    for name, value in record.items()
                    if name in ("epoch", "loss", "lr", "gnorm", "valid_loss", "ema_decay")
                    or name.startswith("valid_best")
                }
                found[kind, record.get("num_updates", record.get("valid_num_updates"))] = kept
    return found


def end_of(folder):
    """The files at the end, and what the last one holds."""
    state = read_checkpoint(folder / "checkpoint_last.pt")
    extra = state["extra_state"]
    kept = {name: extra.get(name) for name in ("best", "val_loss", "train_iterator", "steering")}
    tensors = {**state["model"], **extra.get("ema", {})}
    for number, moments in state["last_optimizer_state"]["state"].items():
        tensors |= {(number, name): value for name, value in moments.items()}
    schedule = state["optimizer_history"][-1]["lr_scheduler_state"]
    schedule.pop("last_epoch", None)  # which nothing goes by
    return sorted(path.name for path in folder.glob("*.pt")), kept, schedule, tensors


def check(options, last_update, data, tmp_path, cuts):
    """Compare a training with others that are cut; returns the command of the last of these."""
    uncut = train(data, **words(tmp_path / "uncut", options))
    expected, files = steps(uncut), end_of(tmp_path / "uncut")
    assert max(number for kind, number in expected if kind == "train_inner") == last_update
    rates = {step["lr"] for (kind, _), step in expected.items() if kind == "train_inner"}
    assert len(rates) > 1 or "lr_scheduler" not in options
    for name, update in cuts:
        folder = tmp_path / f"{name}-{update}"
        command = train_command(data, **words(folder, options))
        first = run("python", INTERRUPTED, name, update, *command[1:], check=False)
        assert first.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), first.tail()
        then = run(*command)
        assert steps(first, then) == expected, (name, update)
        *found, tensors = end_of(folder)
        assert found == list(files[:-1]), (name, update)
        assert tensors.keys() == files[-1].keys()
        for key, value in tensors.items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, files[-1][key]), key
    return command


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_training_ends_as_another(name, data, tmp_path):
    command = check(*CASES[name], data, tmp_path, cuts=[CUTS[0], CUTS[1]])
    if name == "patience":
        again = run(*command)
        assert "this training has ended before, because of --patience 5" in again.stdout
        assert not again.log("train_inner"), "what has ended does not go on"


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CASES)
def test_whatever_steers_it(name, data, tmp_path):
    check(*MORE_CASES[name], data, tmp_path, CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_wherever_it_is_cut(name, data, tmp_path):
    check(*CASES[name], data, tmp_path, [CUTS[2], BEFORE_VALIDATION])
