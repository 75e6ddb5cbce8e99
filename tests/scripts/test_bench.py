"""The benchmarks measure what they say: small runs of the real scripts."""

import json

import pytest
import toy_task

SCRIPTS = toy_task.REPOSITORY / "scripts"


@pytest.mark.parametrize("script", ["bench_train", "bench_generate"])
def test_rows_against_dense(script, tmp_path):
    words = ("--scale", "tiny", "--rows", "smoe-2-2-2-2", "dense", "--tokens", 200, "--rounds", 3)
    outcome = toy_task.run("python", SCRIPTS / f"{script}.py", *words, "--to", tmp_path, "--cpu")
    report = json.loads((tmp_path / "results.json").read_text())
    smoe, dense = report["results"]
    assert (smoe["row"], dense["row"]) == ("SMoE-2-2-2-2", "Dense")
    assert dense["flops"] == 1 and 0.2 < dense["efficiency"] < 5  # the same against itself
    assert smoe["flops"] > 1 and 0 < smoe["speed"] < 2 and report["cores"] >= 1
    assert (tmp_path / "efficiency.png").stat().st_size > 5000
    assert (tmp_path / "table.md").read_text() in outcome.stdout


def test_block(tmp_path):
    words = ("--strata", 4, "2-2", "--tokens", 128, "--embed-dim", 32, "--ffn-dim", 64)
    words += ("--experts", 2, 8, "--experts-tokens", 64, "--rounds", 3, "--cpu", "--to", tmp_path)
    outcome = toy_task.run("python", SCRIPTS / "bench_block.py", *words)
    report = json.loads((tmp_path / "results.json").read_text())
    vanilla, strata = report["results"]
    assert vanilla["mean_passes"] == 1 and 1 < strata["mean_passes"] < 2
    assert vanilla["rows"] <= 2 * 128 < strata["rows"]
    assert vanilla["fairscale"] > 0 and strata["fairscale"] is None
    assert strata["one_hot"] > 0
    assert all(0 < r["efficiency"] < r["products"] for r in report["results"])
    assert [r["experts"] for r in report["experts"]] == [8]
    assert (tmp_path / "efficiency.png").stat().st_size > 5000
    assert (tmp_path / "table.md").read_text() in outcome.stdout
