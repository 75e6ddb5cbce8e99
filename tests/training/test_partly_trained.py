"""Parameters that some or all updates leave as they are: central tensors (MPOE), and what PESC
freezes."""

import itertools

import pytest
import torch
import toy_task
from toy_task import train

from fairseq_smoe.errors import OptionError
from fairseq_smoe.training.trainer import SMoETrainer, check_options

MPOE, PESC = toy_task.MODELS["mpoe"], toy_task.MODELS["pesc"]
CENTRAL = ("common.fc1_central", "common.fc2_central")


def make_trainer(data, *words, **options):
    options = {"weight_decay": 0.1, "lr_scheduler": "fixed", "warmup_updates": None, **options}
    options |= {"total_num_update": None, "clip_norm": 1.0}
    cfg, task, model, criterion = toy_task.set_up(data, *words, **options)
    for part in (cfg.common, cfg.distributed_training, cfg.optimizer):
        part.tpu = False  # as in fairseq-train, see training/compat.py
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=200, seed=1)
    return SMoETrainer(cfg, task, model, criterion), batches.next_epoch_itr(shuffle=False)


def values(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def changes(trainer, batches, updates):
    """For each update the names of the parameters that it changed."""
    found = []
    for batch in itertools.islice(batches, updates):
        before = values(trainer)
        trainer.train_step([batch])
        after = values(trainer)
        found.append({name for name in before if not torch.equal(before[name], after[name])})
    return found


@pytest.mark.parametrize("precision", [[], ["--bf16"], ["--fp16"], ["--memory-efficient-fp16"]])
def test_masked_central_tensors_do_not_change(precision, data):
    """Not by momentum or weight decay either. All others do."""
    more = ("--mpo-central-mask-prob", "1", *precision)
    trainer, batches = make_trainer(data, *MPOE, *more, fp16_init_scale=1)
    everything = set(values(trainer))
    centrals = {name for name in everything if name.endswith(CENTRAL)}
    assert len(centrals) == 4
    changed = set().union(*changes(trainer, batches, 3))
    assert not changed & centrals
    assert len(changed) > 0.9 * len(everything - centrals)


def test_masks_are_drawn_for_each_tensor_and_update(data):
    """With an earlier momentum, too. The draws depend on the update alone."""
    found = []
    for _ in range(2):
        trainer, batches = make_trainer(data, *MPOE, "--mpo-central-mask-prob", "0.5")
        found.append(changes(trainer, batches, 12))
    assert found[0] == found[1]
    centrals = sorted(name for name in values(trainer) if name.endswith(CENTRAL))
    drawn = [tuple(name in changed for name in centrals) for changed in found[0]]
    assert len(set(drawn)) > 4 and 12 < sum(map(sum, drawn)) < 36


def test_without_masks_training_is_ordinary(data):
    states = []
    for words in ((), ("--mpo-central-mask-prob", "0")):
        trainer, batches = make_trainer(data, *MPOE, *words)
        changed = changes(trainer, batches, 2)
        assert all(any(name.endswith(c) for name in changed[0]) for c in CENTRAL)
        states.append(values(trainer))
    torch.testing.assert_close(*states, rtol=0, atol=0)


# --------------------------------------------------------------------------------------
# frozen parts


def is_adapter(name):
    return ".gates." in name or name.endswith((".down_weight", ".up_weight"))


@pytest.mark.parametrize(
    "frozen, words",
    [("ffn", []), ("backbone", []), ("backbone", ["--bf16"]), ("none", [])],
)
def test_frozen_parts_do_not_change(frozen, words, data):
    trainer, batches = make_trainer(data, *PESC, "--pesc-freeze", frozen, *words)
    changed = set().union(*changes(trainer, batches, 4))
    everything = set(values(trainer))
    of_ffn = {name for name in everything if ".experts.ffn." in name}
    adapters = set(filter(is_adapter, everything))
    assert len(of_ffn) == 8 and len(adapters) == 8
    if frozen == "backbone":
        # in half precision small steps are lost
        assert changed == adapters if not words else changed <= adapters
    elif frozen == "ffn":
        assert not changed & of_ffn and adapters <= changed
        assert any("self_attn" in name for name in changed)
        assert any(".norms." in name for name in changed)
    else:
        assert adapters | of_ffn <= changed


def test_new_parts_of_arrangements_are_trained(data):
    """CMR's own FFN and gate are not of the dense model."""
    words = ("--moe-cmr", "--pesc-freeze", "backbone")
    trainer, _ = make_trainer(data, *PESC, *words)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("cmr_gate" in name for name in trained)
    assert all(is_adapter(n) or "cmr_gate" in n or ".expert_block.fc" in n for n in trained)


def test_a_training_goes_on_with_the_same_parts_frozen(data, tmp_path):
    options = {"max_update": 4, "save_interval_updates": 2, "log_interval": 1}
    frozen = ("--pesc-freeze", "backbone")
    whole = train(data, tmp_path / "whole", *PESC, *frozen, **options)
    halfway = {"restore_file": tmp_path / "whole" / "checkpoint_1_2.pt", **options}
    assert train(data, tmp_path / "more", *PESC, *frozen, **halfway).losses() == whole.losses()[2:]
    other = train(data, tmp_path / "other", *PESC, check=False, **halfway)
    assert other.returncode == 1
    (line,) = [line for line in other.stderr.splitlines() if "error: " in line]
    assert "--pesc-freeze" in line and "--reset-optimizer" in line


@pytest.mark.parametrize(
    "words, named",
    [
        (("--pesc-freeze", "ffn", *PESC), "--pesc-freeze ffn"),
        (("--mpo-central-mask-prob", "0.5", *MPOE), "--mpo-central-mask-prob 0.5"),
    ],
)
def test_not_with_shards(words, named, data):
    cfg, *_ = toy_task.set_up(data, *words, ddp_backend="fully_sharded")
    with pytest.raises(
        OptionError, match=f"{named} with --ddp-backend fully_sharded: not possible"
    ):
        check_options(cfg, None)
