"""Experts that come and go in a training: counts, optimizers, checkpoints, several processes."""

import pytest
import torch
import toy_task
from ranks import run_ranks

from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.errors import OptionError
from fairseq_smoe.training import changing_experts
from fairseq_smoe.training.changing_experts import begin_anew
from fairseq_smoe.translation.layers import expert_layers

WORDS, SENTENCES = 40, 6
pytestmark = pytest.mark.xdist_group("changing experts")  # one worker makes what all of them need
MODEL = ["--smoe-strata", "2-2", "--moe-gate", "top-any", "--moe-max-experts", "4"]
# the experts change after updates 8 and 16, by what is counted from 6 and from 14 on
INTERVALS = {"dyn_update_interval": 8, "dyn_record_interval": 3}
# without anything random, and without Adam, which divides by the gradient's size
EXACT = {
    "dropout": 0,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.02,
    "lr_scheduler": "fixed",
    "warmup_updates": None,
    "total_num_update": None,
    "clip_norm": 0.5,
}
SAVE_AFTER = 7


def make_trainer(data, **options):
    from fairseq_smoe.training.trainer import SMoETrainer

    cfg, task, model, criterion = toy_task.set_up(data, *MODEL, **{**INTERVALS, **EXACT, **options})
    for _, layer in expert_layers(model):
        for gate in layer.routed_block.gates:  # its first expert is never active, the others seldom
            gate.threshold.data.fill_(0.1)[0] = 2
    return SMoETrainer(cfg, task, model, criterion)


def make_batch(number, task):
    """Sentences of random words, of uneven length, which are padded."""
    return toy_task.random_batch(number, task, WORDS, SENTENCES, range(2, 9))


def batches_of(update, task, rank=0, processes=1):
    """Two for an update, but only one for the last before the experts change. A process without
    one has an empty one."""
    numbers = [2 * update, 2 * update + 1] if update != 8 else [2 * update]
    batches = [make_batch(number, task) for number in numbers]
    return batches if processes == 1 else [batches[rank] if rank < len(batches) else {}]


def train(trainer, updates, rank=0, processes=1):
    trainer.reset_dummy_batch(make_batch(0, trainer.task))
    for update in updates:
        trainer.train_step(batches_of(update, trainer.task, rank, processes))
        assert trainer.get_num_updates() == update
    return trainer


def state_of(trainer):
    """The model's state with the experts of all processes."""
    group = trainer.expert_group
    state = {name: value.clone() for name, value in trainer._model.state_dict().items()}
    for name, value in state.items():
        if group is not None and ".experts." in name:
            state[name] = group.all_experts(value)
    return state


def gates_of(trainer):
    return [g for _, layer in expert_layers(trainer._model) for g in layer.routed_block.gates]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    toy_task.write_dictionaries(folder, toy_task.LANGS, WORDS)
    return folder


# --------------------------------------------------------------------------------------
# one process


def expected_counts(trainer, batches):
    """What the gates should count in some batches, by what they return."""
    sums = [torch.zeros_like(gate.counts) for gate in gates_of(trainer)]
    trainer._model.train()
    for batch in batches:
        for gate in gates_of(trainer):
            gate.recording = True
        trainer._model(**batch["net_input"])
        taken = [layer.routing_stats for _, layer in expert_layers(trainer._model)]
        for total, record in zip(sums, [record for stats in taken for record in stats.gates]):
            total += record.counts
    return sums


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_every_token_counts_once(checkpoint_activations, data):
    trainer = make_trainer(data, checkpoint_activations=checkpoint_activations)
    train(trainer, range(1, 6))
    assert not any(gate.counts.any() for gate in gates_of(trainer))
    totals = [torch.zeros_like(gate.counts) for gate in gates_of(trainer)]
    for update in (6, 7):
        for total, counts in zip(
            totals, expected_counts(trainer, batches_of(update, trainer.task))
        ):
            total += counts
        train(trainer, [update])
        assert all(torch.equal(g.counts, total) for g, total in zip(gates_of(trainer), totals))
        assert all(total.any() for total in totals)
    trainer.valid_step(make_batch(3, trainer.task))
    assert all(torch.equal(g.counts, total) for g, total in zip(gates_of(trainer), totals))


def test_a_skipped_step_does_not_count(data, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # fairseq's, when it skips
    options = {"fp16": True, "fp16_init_scale": 1, "dyn_update_interval": 100}
    trainer = make_trainer(data, **options, dyn_record_interval=100)
    trainer.reset_dummy_batch(make_batch(0, trainer.task))
    counted, skipped = 0, 0
    for number in range(12):
        if number == 2:
            trainer.optimizer.scaler.loss_scale = 2.0**18  # gradients overflow until it has fallen
        batch, before = make_batch(number, trainer.task), trainer.get_num_updates()
        trainer.train_step([batch])
        if trainer.get_num_updates() > before:
            counted += int(batch["net_input"]["src_lengths"].sum())
        else:
            skipped += 1
        assert int(gates_of(trainer)[0].counts[0]) == counted  # of the encoder's first stratum
    assert skipped and trainer.get_num_updates() > 2


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"memory_efficient_fp16": True}])
def test_a_new_expert_begins_anew(precision, data, monkeypatch):
    """Its vector is that of the unserved tokens, and the optimizer knows nothing of it."""
    options = {"optimizer": "adam", "momentum": None, "lr": 1e-3, "fp16_init_scale": 1}
    trainer = train(make_trainer(data, **options, **precision), range(1, 8))
    block = expert_layers(trainer._model)[0][1].routed_block
    assert block.gates[0].alive_E.tolist() == [True, True, False, False] * 2
    for kept in trainer.optimizer.optimizer.state.values():
        for moment in (kept["exp_avg"], kept["exp_avg_sq"]):
            moment.add_(1e-4)  # also where there have been no gradients
    begun = []

    def begin(optimizer, rows):
        begin_anew(optimizer, rows)
        begun.extend(rows)

    monkeypatch.setattr(changing_experts, "begin_anew", begin)
    train(trainer, [8])
    # 0, which nobody visits, is gone, and 2 and 6 have come; the first gate still sends some to 4
    assert block.gates[0].alive_E.tolist() == [False, True, True, False, True, True, True, False]
    assert not any(gate.counts.any() for gate in gates_of(trainer))
    stepped = dict(zip(trainer._model.parameters(), trainer.optimizer.params))
    rows = {}
    for new in begun:
        rows.setdefault(new.parameter, set()).add(new.row)
    own = [block.gates[0].weight, block.gates[1].threshold, block.experts.fc1_weight]
    assert [rows[parameter] for parameter in own] == [{2, 6}, {2}, {2, 6}]
    for parameter, numbers in rows.items():
        others = sorted(set(range(len(parameter))) - numbers)
        kept = trainer.optimizer.optimizer.state[stepped[parameter]]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not kept[moment][sorted(numbers)].any() and kept[moment][others].any()
        torch.testing.assert_close(stepped[parameter].to(parameter), parameter, rtol=0, atol=0)
    vector = stepped[block.gates[0].weight][2].detach().float()
    assert vector.norm() == pytest.approx(1, abs=1e-3)
    assert block.gates[0].threshold[2] == 0
    torch.testing.assert_close(block.gates[0].weight[6], block.gates[1].weight[2])


@pytest.mark.parametrize(
    "options",
    [
        {"smoe_stacking": True},
        {"moe_cmr": True},
        {"smoe_norm": "released", "encoder_layers": 4, "encoder_layerdrop": 0.5},
    ],
)
def test_in_all_arrangements(options, data):
    trainer = train(make_trainer(data, **options), range(1, 9))
    for _, layer in expert_layers(trainer._model):
        block = layer.routed_block
        first, last = block.gates
        assert not first.alive_E[0] and first.alive_E[2]  # one has gone, and one has come
        if len(first.alive_E) == 8:  # in a stack, the first gate sees no experts of the second
            assert torch.equal(first.alive_E[4:], last.alive_E)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "adafactor", "momentum": None}, "--optimizer adafactor with --moe-gate"),
        ({"zero_sharding": "os"}, "--zero-sharding os with --moe-gate top-any, whose experts come"),
        ({"ddp_backend": "fully_sharded"}, "--ddp-backend fully_sharded with --moe-gate top-any"),
    ],
)
def test_what_does_not_go_together(options, message, data):
    with pytest.raises(OptionError) as error:
        make_trainer(data, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------
# two processes

CASES = {
    "shared experts": {"moe_expert_parallel_size": 2},
    "each all experts": {"moe_expert_parallel_size": 1, "checkpoint_activations": True},
}
ITERATOR = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 1}}


def train_two(rank, data, folder):
    for case, options in CASES.items():
        trainer = make_trainer(data, distributed_world_size=2, **options)
        train(trainer, range(1, SAVE_AFTER + 1), rank, 2)
        trainer.consolidate_optimizer()
        trainer.store_experts(folder / case)
        if rank == 0:
            (folder / case).mkdir(exist_ok=True)
            trainer.save_checkpoint(str(folder / case / "after.pt"), {**ITERATOR})
        trainer.stored_experts = None
        train(trainer, range(SAVE_AFTER + 1, 21), rank, 2)
        torch.save(state_of(trainer), folder / case / f"{rank}.pt")


@pytest.fixture(scope="module")
def by_two(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_ranks(train_two, 2, data, folder)
    return folder


@pytest.fixture(scope="module")
def alone(data):
    """The states of one process where two save, and after all updates."""
    trainer = train(make_trainer(data), range(1, SAVE_AFTER + 1))
    then = state_of(trainer)
    return then, state_of(train(trainer, range(SAVE_AFTER + 1, 21)))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-5 if value.is_floating_point() else 0
        if name.endswith("counts"):  # sums of tokens, which are rounded
            tolerance = 1e-5 * 2**24 * 1000
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case, by_two, alone):
    """Across two changes of the experts, before the first of which a process has no batch."""
    then, expected = alone
    alive = [name for name in expected if name.endswith("alive_E")]
    assert len(alive) == 4  # two gates in each of two blocks
    assert not any(torch.equal(then[name], expected[name]) for name in alive)
    states = [torch.load(by_two / case / f"{rank}.pt") for rank in range(2)]
    for state in states:
        assert_same(state, expected)
    for name in states[0]:
        if ".gates." in name:
            assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize("case", CASES)
def test_one_goes_on_from_the_middle_of_counting(case, by_two, alone, data):
    then, expected = alone
    trainer = make_trainer(data)
    trainer.load_checkpoint(str(by_two / case / "after.pt"))
    assert trainer.get_num_updates() == SAVE_AFTER
    assert any(gate.counts.any() for gate in gates_of(trainer))
    assert_same(state_of(trainer), then)
    assert_same(state_of(train(trainer, range(SAVE_AFTER + 1, 21))), expected)


def test_inspect_says_how_many_experts_are_alive(by_two):
    facts = describe(by_two / "shared experts" / "after.pt")
    assert facts["experts"] == "strata 4-4" and facts["live experts"] == "8 of 16"
