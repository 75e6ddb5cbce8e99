"""``scripts/demo.sh`` from installation to table, twice."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

LEARNED_CHRF = 20  # mean over the directions; 28 and 29 were measured
SCRIPT = Path(__file__).parent.parent / "scripts" / "demo.sh"


def run_demo(*arguments, **options):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_help_explains():
    outcome = run_demo("--help")
    assert outcome.returncode == 0 and outcome.stdout.startswith("usage: bash scripts/demo.sh")


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["--fast"], {}, "error: --fast: unknown option"),
        ([], {"PYTHON": "no-such-python"}, "error: PYTHON=no-such-python: expected Python 3.11"),
    ],
)
def test_mistakes_are_named(arguments, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = run_demo(*arguments)
    assert outcome.returncode != 0 and not outcome.stdout
    assert outcome.stderr.startswith(message) and outcome.stderr.count("\n") == 1


@pytest.mark.slow
def test_demo_trains_compares_and_resumes(tmp_path):
    first = run_demo(tmp_path / "out")
    assert first.returncode == 0, first.stdout + first.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in first.stdout
    results = json.loads((tmp_path / "out" / "scores.json").read_text())
    smoe, vanilla = results["SMoE-2-2-2-2"], results["MoE-8"]
    assert len(smoe) == len(vanilla) == 8
    assert all(1 < result[side] < 4 for result in smoe.values() for side in ("encoder", "decoder"))
    assert all(result["encoder"] == result["decoder"] == 1 for result in vanilla.values())
    for directions in (smoe, vanilla):
        assert sum(result["chrf"] for result in directions.values()) / 8 > LEARNED_CHRF
    assert (tmp_path / "out" / "requested-capacity-SMoE-2-2-2-2.png").stat().st_size > 10_000

    (tmp_path / "out" / "translated").unlink()  # as if interrupted in the middle of this step
    shutil.rmtree(tmp_path / "out" / "MoE-8" / "translations")
    second = run_demo(tmp_path / "out")
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("already done") == 4
    assert table in second.stdout
