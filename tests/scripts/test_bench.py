"""The benchmarks measure what they say: small runs of the real scripts."""

import json
from importlib.util import find_spec

import pytest
import toy_task
from bench_prepare import duration, seconds_of

SCRIPTS = toy_task.REPOSITORY / "scripts"


@pytest.mark.slow  # test_check_gpu.py runs them, too
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


@pytest.mark.slow
def test_options_against_none(tmp_path):
    words = ("--scale", "tiny", "--rows", "smoe-2-2-2-2", "--tokens", 200, "--rounds", 2, "--cpu")
    sets = ["--chunked-loss 64 --optimizer fused_adam", "--moe-freq 1"]
    command = ("python", SCRIPTS / "bench_train.py", *words, "--options", *sets, "--to", tmp_path)
    outcome = toy_task.run(*command)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["options"] for r in results] == sets
    assert 0 < results[0]["time"] < 1.5 and results[1]["time"] > 1  # twice as many expert layers
    assert all(100 < r["peak_mib"] < 2000 > r["stock_peak_mib"] for r in results)
    assert (tmp_path / "table.md").read_text() in outcome.stdout


@pytest.mark.slow
def test_loss(tmp_path):
    words = ("--tokens", 2000, "--vocabulary", 5000, "--width", 32, "--chunks", 100, 2000)
    command = ("python", SCRIPTS / "bench_loss.py", *words, "--rounds", 2, "--cpu")
    outcome = toy_task.run(*command, "--to", tmp_path)
    small, large, adam = json.loads((tmp_path / "results.json").read_text())["results"]
    assert small["peak_mib"][0] < min(large["peak_mib"][0], small["peak_mib"][1] / 4)
    assert 0 < adam["time"] < 1
    assert (tmp_path / "table.md").read_text() in outcome.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_small_experts(tmp_path):
    words = ("--embed-dim", 32, "--ffn-dim", 64, "--layers", 1, "--experts", 8, "--kept", 2, 8)
    words += ("--tokens", 3, 40, "--sentences", 2, "--vocab", 50, "--length", 5, "--rounds", 3)
    outcome = toy_task.run("python", SCRIPTS / "bench_moefy.py", *words, "--to", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [(r["kept"], r["tokens"]) for r in report["ffns"]] == [(2, 3), (2, 40), (8, 3), (8, 40)]
    assert [(r["kept"], r["sentences"]) for r in report["beam_search"]] == [(2, 2), (8, 2)]
    assert all(0 < r["speed"] < 20 for r in report["ffns"] + report["beam_search"])
    assert (tmp_path / "table.md").read_text() in outcome.stdout


@pytest.mark.slow
def test_latency(tmp_path):
    words = ("--scale", "tiny", "--rows", "vanilla-moe", "--length", 8, "--rounds", 3)
    command = ("python", SCRIPTS / "bench_latency.py", *words, "--sentences", 2, "--to", tmp_path)
    outcome = toy_task.run(*command)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    speed = {r["model"]: r["speed"] for r in results}
    assert speed["Dense, float32"] == 1 and 0 < speed["Vanilla MoE, float32"] < 2
    assert {"Dense, int8", "Vanilla MoE, int8"} <= speed.keys()
    assert ("Dense, CTranslate2 int8" in speed) == bool(find_spec("ctranslate2"))
    assert (tmp_path / "table.md").read_text() in outcome.stdout


@pytest.mark.slow
def test_int8(spoken, spoken_data):
    command = ("python", SCRIPTS / "bench_int8.py", spoken, "--data", spoken_data)
    lines = toy_task.run(*command, "--sentences", 20).stdout.splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines if "|" in line}
    (plain, memory), (rounded, less) = (map(float, rows[kind]) for kind in ("float32", "int8"))
    assert plain > 5 and rounded > 2 and memory > 0 and less > 0
    assert any(line.startswith("80 sentences, ") for line in lines)


@pytest.mark.slow
def test_contrast(trained, data, tmp_path):
    words = ("--direction", "en-aa", "--subset", "test", "--sentences", 20, "--rounds", 3)
    command = ("python", SCRIPTS / "bench_contrast.py", trained("smoe"), data, *words)
    outcome = toy_task.run(*command, "--cpu", "--to", tmp_path)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [r["beam"] for r in report["results"]] == [1, 5]
    for r in report["results"]:
        assert 0.3 < r["time"] < 5 and 0.9 < r["tokens"] < 1.1
    assert (tmp_path / "table.md").read_text() in outcome.stdout


def test_prepare(tmp_path):
    script = SCRIPTS / "bench_prepare.py"
    words = ("--pairs", 2500, "--workers", 1, "--steps", "fetch", "verify", "clean")
    words += ("--repeated", 0.1, "--piece-lines", 100, "--work", tmp_path / "large")
    words += ("--to", tmp_path)
    outcome = toy_task.run("python", script, *words)
    report = json.loads((tmp_path / "results.json").read_text())
    assert [r["step"] for r in report["results"]] == ["fetch", "verify", "clean"]
    assert all(10 < r["own_mib"] <= r["all_mib"] < 1000 for r in report["results"])
    cleaned = json.loads((tmp_path / "large/data/work/clean/cleaned.json").read_text())
    assert cleaned["de-en"]["train"]["duplicate"]["lines"] > 100
    assert (tmp_path / "table.md").read_text() in outcome.stdout
    more = ("--from", tmp_path, "--pairs", 250_000, "--workers", 4)
    lines = toy_task.run("python", script, *more).stdout.splitlines()
    assert lines[0].startswith("| 250,000 pairs, 4 workers ")
    steps = [line.split("|")[1].strip() for line in lines[2:]]
    assert steps == ["fetch", "verify", "clean"]
    parts = {part["part"]: part for part in report["results"][2]["parts"]}
    assert (parts["write"]["unit"], parts["write"]["jobs"]) == ("piece", 25)
    assert parts["measure"]["jobs"] == parts["join"]["jobs"] == 1
    expected = duration(seconds_of(report["results"][2], 100, 1, 4))
    assert lines[-1].split("|")[2].strip() == expected


def test_seconds_of_a_larger_pair():
    parts = (("measure", "pair", 1, 2), ("write", "piece", 10, 30), ("train", "call", 1, 7))
    step = {
        "seconds": 40,
        "parts": [dict(zip(("part", "unit", "jobs", "seconds"), part)) for part in parts],
    }
    assert seconds_of(step, 1, 2, 2) == pytest.approx(40)
    assert seconds_of(step, 1, 2, 1) == pytest.approx(40 + 30)
    assert seconds_of(step, 3, 2, 6) == pytest.approx(3 + 6 + 30 + 7)
    assert seconds_of(step, 3, 2, 1000) == pytest.approx(3 + 6 + 6 + 7)  # 30 pieces
