"""``--help`` of fairseq's commands explains the plugin's options."""

import os
import subprocess
import sys
from dataclasses import fields

from fairseq_smoe.translation.options import RoutingOptions


def test_help_of_the_chosen_model_task_and_criterion():
    from fairseq_smoe.translation.criterion import MoELabelSmoothedCrossEntropyConfig

    code = "from fairseq_cli.train import cli_main; cli_main()"
    command = [sys.executable, "-c", code, "--help", "--user-dir", "fairseq_smoe"]
    command += ["--task", "smoe_translation", "--arch", "smoe_transformer"]
    command += ["--criterion", "moe_label_smoothed_cross_entropy"]
    wide = {**os.environ, "COLUMNS": "300"}  # no line breaks inside the texts
    outcome = subprocess.run(command, capture_output=True, text=True, env=wide)
    assert outcome.returncode == 0, outcome.stderr
    for config in (RoutingOptions, MoELabelSmoothedCrossEntropyConfig):
        for option in fields(config):
            text = option.metadata.get("help")
            if text:
                assert "--" + option.name.replace("_", "-") in outcome.stdout
                assert text in outcome.stdout
    assert "--requested-capacity-file" in outcome.stdout
