"""scripts/check_gpu.sh tried on the CPU: every step, one that fails, one that takes too long."""

import json
import re
import sys

import pytest
import toy_task

PAIRS = ("eng-nso", "eng-msa", "eng-tgl", "eng-cat")
BLOCKS = ("block-grouped_mm", "block-loop")
STEPS = ("doctor", "tests", *BLOCKS, "train", "options", "generate", "batch", "m15")
# one of the tests for GPUs: the others are tried by hand, see docs/gpu.md
FEW_TESTS = "-n 0 -k recomputation"


@pytest.fixture(scope="module")
def m4_data(make_once):
    """Folder in the shape of M4's data, with a few made-up sentences."""

    def make(folder):
        toy_task.write_dictionaries(folder, ["eng", "nso", "msa", "tgl", "cat"], 1000)
        for pair in PAIRS:
            for split, sentences in (("train", 400), ("valid", 8), ("test", 8)):
                toy_task.write_binarised(folder, split, pair, sentences)

    return make_once("m4-data", make)


def check_gpu(data, out, minutes, *steps, check=True):
    settings = f"PYTEST_ADDOPTS={FEW_TESTS}", f"PYTHON={sys.executable}"
    command = ("bash", "scripts/check_gpu.sh", data, out, minutes, "--device", "cpu", *steps)
    return toy_task.run("env", *settings, *command, check=check)


def outcomes(page):
    """``{step: outcome}`` of the first table of gpu.md."""
    table = page[: page.find("\n## ")]
    return dict(re.findall(r"^\| ([\w-]+) +\| +\d+ \| +(.*) \|$", table, re.MULTILINE))


def test_steps_run_and_write(m4_data, tmp_path):
    out, steps = tmp_path / "gpu", ("block-loop", "m15")
    check_gpu(m4_data, out, 40, *steps)
    page = (out / "gpu.md").read_text()
    assert outcomes(page) == dict.fromkeys(steps, "complete")
    for step in steps:
        numbers = json.loads((out / step / "results.json").read_text())
        assert numbers["results"] and (out / step / "table.md").read_text() in page
    again = check_gpu(m4_data, out, 40, *steps)
    assert again.stdout == f"== {out}/gpu.md\n"  # nothing was left to do


@pytest.mark.slow
def test_every_step_runs_and_writes(m4_data, tmp_path):
    out = tmp_path / "gpu"
    check_gpu(m4_data, out, 40)
    page = (out / "gpu.md").read_text()
    assert outcomes(page) == dict.fromkeys((*STEPS, "m4"), "complete")
    log = (out / "doctor/log.txt").read_text()
    for line in ("block bf16", "training fp32", "training fp16", "training bf16", "translation"):
        assert re.search(rf"{line} .* ok$", log, re.MULTILINE), log
    assert log.splitlines()[-1] == "ready: trains and translates on the CPU"
    assert "6 passed, 0 failed, 0 skipped" in page
    for step in STEPS[2:]:
        numbers = json.loads((out / step / "results.json").read_text())
        assert numbers["results"] and (out / step / "table.md").read_text() in page
    for row in ("vanilla-moe", "smoe-2-2-2-2"):
        assert re.search(rf"^\| {row} +\| +10 \| +[\d.]+ \| +[\d.]+ \|", page, re.MULTILINE)
    again = check_gpu(m4_data, out, 40)
    assert again.stdout == f"== {out}/gpu.md\n"  # nothing was left to do


def test_a_step_that_ends_badly_leaves_the_others_alone(tmp_path):
    out, missing = tmp_path / "gpu", tmp_path / "missing"
    outcome = check_gpu(missing, out, 1, "doctor", "m4", check=False)
    assert outcome.returncode == 1
    found = outcomes((out / "gpu.md").read_text())
    assert found["doctor"] == "stopped after 4 s, its share of the time"
    assert found["m4"] == "failed with exit code 1, see m4/log.txt"
    assert f"error: --data {missing}: holds no prepared text" in (out / "m4/log.txt").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("data", "out", "soon"), "error: MINUTES soon: expected a number, e.g. 15"),
        (("data", "out", "1", "--device", "tpu"), "error: --device tpu: expected cuda or cpu"),
        (("data", "out", "1", "dance"), "error: STEP dance: expected doctor tests "),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    command = ("bash", toy_task.REPOSITORY / "scripts/check_gpu.sh", *arguments)
    outcome = toy_task.run(*command, cwd=tmp_path, check=False)
    assert outcome.returncode == 2 and outcome.stderr.startswith(message)
    assert list(tmp_path.iterdir()) == []
