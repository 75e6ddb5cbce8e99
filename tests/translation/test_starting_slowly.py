"""Options for the start of the training: initial values by depth, and the curriculum of passes."""

import pytest
import torch
import toy_task
from toy_task import set_up

from fairseq_smoe.plots.train_log import read_log


@pytest.mark.parametrize(
    "options",
    [
        ("--smoe-strata", "2-2-2"),
        ("--smoe-strata", "4"),
        ("--smoe-strata", "2-2", "--smoe-stacking"),
    ],
    ids=" ".join,
)
def test_depth_init_divides_output_layers_by_the_root_of_the_depth(options, data):
    options = [*options, "--encoder-layers", "4", "--encoder-layerdrop", "0.5"]
    _, _, plain, _ = set_up(data, *options)
    _, _, scaled, _ = set_up(data, *options, "--smoe-depth-init")
    after = scaled.state_dict()
    strata = int(options[1][0] != "4") * options[1].count("-") + 1
    size = int(options[1][0])
    # dense, block, dense, block
    depths = {0: 1, 1: 2, 2: 2 + strata, 3: 3 + strata}
    for name, before in plain.state_dict().items():
        factor = torch.ones(())
        if name.split(".")[1] == "layers":
            layer, part = int(name.split(".")[2]), name.split(".", 3)[3]
            if part.endswith("attn.out_proj.weight") or part == "fc2.weight":
                factor = torch.tensor(float(depths[layer])) ** -0.5
            elif part == "expert_block.experts.fc2_weight":
                stratum_E = torch.arange(len(before)) // size
                factor = ((depths[layer] + stratum_E).float() ** -0.5).view(-1, 1, 1)
        torch.testing.assert_close(after[name], before * factor)


def test_curriculum_opens_the_passes_in_training_and_a_resumed_one_goes_on(data, tmp_path):
    options = ("--smoe-strata", "2-2-2", "--smoe-pass-curriculum", "16")

    def requested(folder, updates):
        log = tmp_path / f"{folder}-{updates}.log"
        toy_task.train(
            data, tmp_path / folder, *options, max_update=updates, log_interval=1, log_file=log
        )
        return {
            update: float(record["encoder_requested_capacity"])
            for update, record in read_log(log)["train_inner"].items()
        }

    whole = requested("whole", 24)
    assert whole[1] == 1 and 1 < whole[8] < whole[16]
    assert min(whole[update] for update in range(17, 25)) > whole[8]
    requested("halves", 8)
    resumed = requested("halves", 24)
    assert min(resumed) == 9
    assert resumed == {update: whole[update] for update in range(9, 25)}
