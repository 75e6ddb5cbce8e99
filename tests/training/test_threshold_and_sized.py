"""Trainings of XMoE and HMoE by the real commands: logs, processes that share experts, checkpoints
of experts of different widths."""

import pytest
import torch
from test_expert_parallel import assert_model_of_one, losses, merged, train
from toy_task import MODELS, set_up

from fairseq_smoe.accounting.flops import count_parameters
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.gates import gate_sizes
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.experts import PADDING

# 128 hidden units on average, as equal experts have
SIZED = [
    *("--smoe-strata", "2-2", "--moe-experts", "sized", "--moe-ffn-dims", "64,192/32,224"),
    *("--moe-router-entropy", "0.03", "--moe-gate", "threshold", "--moe-threshold", "0.6"),
    *("--moe-threshold-weights", "renormalised"),
]
# model, --update-freq of two processes, other options of theirs
CASES = {
    "xmoe": (MODELS["xmoe"], 1, {}),
    "hmoe": (SIZED, 2, {"checkpoint_activations": True}),
}


@pytest.fixture(scope="module")
def by_two(make_once, data):
    """``by_two(name)``: 20 updates by two processes that share the experts, and the losses and the
    model of one process."""

    def trained(name):
        model, steps, more = CASES[name]

        def make(folder):
            alone = train(data, folder / "alone", 1, *model, update_freq=2 * steps)
            both = train(data, folder / "both", 2, *model, update_freq=steps, **more)
            assert losses(both) == pytest.approx(losses(alone), abs=1e-5)
            (folder / "log").write_text(both.stdout + both.stderr)

        return make_once(f"by-two-{name}", make)

    return trained


@pytest.mark.parametrize("name", CASES)
def test_two_train_the_model_that_one_trains(name, by_two):
    folder = by_two(name)
    assert_model_of_one(folder / "both", folder / "alone")


def test_hmoe_logs_its_losses(by_two):
    log = (by_two("hmoe") / "log").read_text()
    for name in ("moe_p_penalty", "moe_router_entropy", "moe_gate_loss", "experts_per_token"):
        assert f'{name}": ' in log


def test_padding_is_recorded_and_stays_zero(by_two, data):
    """In parts and in one piece; without it, there are as many parameters as in equal experts."""
    folder = by_two("hmoe")
    state = merged(folder / "both")["model"]
    _, _, equal, _ = set_up(data, "--smoe-strata", "2-2")
    for path in (folder / "both" / "checkpoint_last.pt", folder / "alone" / "checkpoint_last.pt"):
        assert describe(path)["parameters"] == count_parameters(equal)
    blocks = [name.removesuffix(PADDING) for name in state if name.endswith(PADDING)]
    assert len(blocks) == 2
    for block in blocks:
        weight_EDF, weight_EFD = (state[f"{block}.experts.fc{i}_weight"] for i in (1, 2))
        for e, width in enumerate((64, 192, 32, 224)):
            assert weight_EDF[e, :, :width].all() and not weight_EDF[e, :, width:].any()
            assert weight_EFD[e, :width].all() and not weight_EFD[e, width:].any()


def test_other_widths_are_refused(by_two, data):
    """Also where the widest expert, and hence the shapes, are the same."""
    state = torch.load(by_two("hmoe") / "alone" / "checkpoint_last.pt", weights_only=False)["model"]
    _, _, same, _ = set_up(data, *SIZED)
    same.load_state_dict(state)
    changed = ["32,224/64,192" if word == "64,192/32,224" else word for word in SIZED]
    _, _, other, _ = set_up(data, *changed)
    with pytest.raises(OptionError, match="experts have other widths .* --moe-ffn-dims or"):
        other.load_state_dict(state)
    _, _, equal, _ = set_up(data, "--smoe-strata", "2-2", "--encoder-ffn-embed-dim", "224")
    with pytest.raises(OptionError, match="experts.padding"):
        equal.load_state_dict(state)


def test_a_split_multiplies_the_experts(by_two, data):
    """The checkpoint, the model and the counts agree on the strata."""
    path = by_two("xmoe") / "both" / "checkpoint_last.pt"
    assert describe(path)["experts"] == "strata 4-4"
    _, _, model, _ = set_up(data, *MODELS["xmoe"])
    assert set(gate_sizes(model.state_dict()).values()) == {(8, 4)}
    _, _, whole, _ = set_up(data, "--smoe-strata", "2-2")
    # each part has an output bias of its own, and the gates have a row for each
    parts, dim, blocks = 4, 64, 2
    more = blocks * parts * dim + blocks * (parts + parts // 2) * dim
    assert count_parameters(model) == count_parameters(whole) + more
    with pytest.raises(OptionError, match="--moe-ffn-split 3: does not divide .* 128"):
        set_up(data, "--smoe-strata", "2-2", "--moe-ffn-split", "3")
    with pytest.raises(OptionError, match="--moe-ffn-split 0: expected 1"):
        set_up(data, "--smoe-strata", "2-2", "--moe-ffn-split", "0")
