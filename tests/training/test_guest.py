"""The plugin in a process that trains something else with fairseq, whatever was imported first."""

import subprocess
import sys

import pytest
import toy_task

# words of the command line -> fairseq-train, from Python
TRAIN = """
import logging
import sys
logging.basicConfig(level="INFO", format="| %(name)s | %(message)s")  # else the first import does
{first}
from fairseq_cli import train
{then}
sys.argv[0] = "fairseq-train"
train.cli_main()
"""
REGISTER = "import fairseq, fairseq_smoe; fairseq_smoe.register()"
ORDERS = {
    "without": {"first": "", "then": ""},
    "before": {"first": REGISTER, "then": ""},
    "after": {"first": "", "then": REGISTER},
}


def train(order, data, folder, arch, max_update):
    """Some updates of a stock model on fairseq's own task ``translation``."""
    words = [
        *(data, "--task", "translation", "--source-lang", "en", "--target-lang", "aa"),
        *("--arch", arch, "--optimizer", "adam", "--lr", "1e-3", "--max-tokens", "500", "--cpu"),
        *("--max-update", max_update, "--save-dir", folder, "--no-epoch-checkpoints"),
        *("--log-format", "json", "--log-interval", "1", "--num-workers", "0", "--seed", "3"),
        *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16", "--encoder-layers", "1"),
        *("--decoder-layers", "1", "--disable-validation"),
    ]
    if arch == "transformer":
        words += ["--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16"]
    else:
        words += ["--encoder-hidden-size", "16", "--decoder-hidden-size", "16"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(**ORDERS[order]), *map(str, words)],
        env=toy_task.environment(),
        cwd=toy_task.REPOSITORY,
        capture_output=True,
        text=True,
    )
    outcome = toy_task.Outcome(words, done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, outcome.tail()
    return outcome.losses()


@pytest.mark.parametrize("arch", ["transformer", pytest.param("lstm", marks=pytest.mark.slow)])
def test_stock_models_train_and_resume_as_without_it(arch, data, tmp_path):
    found = {order: train(order, data, tmp_path / order, arch, max_update=4) for order in ORDERS}
    assert len(found["without"]) == 4
    assert found["before"] == found["after"] == found["without"]
    # a stock fairseq cannot read its own checkpoints on this torch
    resumed = [train(o, data, tmp_path / o, arch, max_update=6) for o in ("before", "after")]
    assert resumed[0] == resumed[1] and len(resumed[0]) == 2
