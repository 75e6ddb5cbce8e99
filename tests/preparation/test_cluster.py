"""``prepare --scheduler``: the same files from a Dask cluster, whoever dies."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy_task
from bench_cluster import Killer
from dask_processes import DaskProcesses, wait_until
from prepared_folder import contents, run, words, write_text

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import cluster

PAIRS = ("en-de", "en-nl", "en-fr")
OPTIONS = {"pairs": ",".join(PAIRS), "vocab-size": "60", "lines-per-shard": "200"}
IN_PIECES = {**OPTIONS, "piece-lines": "50"}


def write_texts(folder, lines):
    for pair in PAIRS:
        write_text(folder, lines, pair)
    return folder


@pytest.fixture(scope="module")
def text(make_once):
    return make_once("cluster-text", lambda folder: write_texts(folder, 400))


@pytest.fixture(scope="module")
def expected(text, tmp_path_factory):
    """What one process makes, with every pair cleaned at once."""
    target = tmp_path_factory.mktemp("expected")
    run(text, target, **OPTIONS)
    return contents(target)


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    with DaskProcesses(tmp_path_factory.mktemp("dask")) as processes:
        yield processes


@pytest.mark.parametrize("workers", ["1", "2"])
def test_pieces_give_the_same_files(text, tmp_path, expected, workers):
    run(text, tmp_path, workers=workers, **IN_PIECES)
    assert contents(tmp_path) == expected


def test_a_cluster_gives_the_same_files(text, tmp_path, expected, dask):
    run(text, tmp_path, scheduler=dask.address, **IN_PIECES)
    assert contents(tmp_path) == expected
    assert not list((tmp_path / "work").glob("cluster-*"))


def test_the_jobs_of_lost_workers_run_again(tmp_path):
    text = write_texts(tmp_path / "text", 4_000)
    options = {**IN_PIECES, "piece-lines": "500"}
    run(text, tmp_path / "expected", **options)
    with DaskProcesses(tmp_path / "dask") as dask:
        killer = Killer(dask, seconds=3, workers=2, schedulers=0)
        killer.finish(["-m", "fairseq_smoe", "prepare", *words(text, tmp_path / "data", **options)])
    assert killer.kills == 2
    assert contents(tmp_path / "data") == contents(tmp_path / "expected")


def test_after_the_loss_of_the_scheduler_the_same_command_goes_on(tmp_path):
    text, target = write_texts(tmp_path / "text", 4_000), tmp_path / "data"
    options = {**IN_PIECES, "piece-lines": "500"}
    run(text, tmp_path / "expected", **options)
    with DaskProcesses(tmp_path / "dask") as dask:
        command = words(text, target, scheduler=dask.address, **options)
        process = subprocess.Popen(
            [sys.executable, "-m", "fairseq_smoe", "prepare", *command],
            cwd=toy_task.REPOSITORY,
            env=toy_task.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        pieces = target / "work" / "clean" / "pieces"
        wait_until(lambda: any(pieces.glob("*/*.judged.npz")))
        dask.kill()
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        last = stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: --scheduler {dask.address}: the connection was lost at ")
        assert "run the same command" in last and "Traceback" not in stderr, stderr
        dask.start()
        run(text, target, scheduler=dask.address, **options)
    assert contents(target) == contents(tmp_path / "expected")


@pytest.mark.slow
def test_ten_workers_and_three_schedulers_are_lost(tmp_path):
    """scripts/bench_cluster.py; its default is larger, and it takes any size."""
    words = ("--pairs", 100_000, "--piece-lines", 20_000, "--vocab-size", 500, "--rounds", 1)
    command = ("python", toy_task.REPOSITORY / "scripts/bench_cluster.py", *words)
    outcome = toy_task.run(*command, "--work", tmp_path / "work", "--to", tmp_path)
    assert "Traceback" not in outcome.stderr
    errors = re.findall("^error: .*", outcome.stderr, re.MULTILINE)
    assert errors and all(error.startswith("error: --scheduler tcp://") for error in errors)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r["kills"] for r in results] == [0, 0, 0, 13]
    assert all(r["same"] for r in results)
    assert all(10 < r["clean_mib"] < 512 for r in results)


def test_a_worker_that_does_not_see_the_folder_is_named(text, tmp_path, monkeypatch):
    hidden = tmp_path / "data"
    hidden.mkdir()
    alone = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user may not hide a folder from a process")
    monkeypatch.setattr(cluster, "VISIBLE_SECONDS", 1)
    with DaskProcesses(tmp_path / "dask", number=0) as dask:
        dask.start_worker(*alone)
        with pytest.raises(
            OptionError, match=rf"--to {hidden}: the worker on .* does not see this"
        ):
            run(text, hidden, scheduler=dask.address, **OPTIONS)


def test_slurm_without_sbatch(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OptionError, match="--scheduler slurm: there is no sbatch here"):
        run(text, tmp_path / "data", scheduler="slurm", **OPTIONS)


def test_no_scheduler(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(OptionError, match="--scheduler tcp://127.0.0.1:9: no scheduler answers"):
        run(text, tmp_path, scheduler="tcp://127.0.0.1:9", **OPTIONS)


# what sbatch does, without a queue: the job runs at once on this machine, in a session of its own,
# from a copy of the script, which may be removed when sbatch ends
SBATCH = """#!/usr/bin/env bash
cp "${!#}" "$JOBS/$$.sh"
setsid bash "$JOBS/$$.sh" >>"$JOBS/log" 2>&1 </dev/null &
echo $! >>"$JOBS/started"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/usr/bin/env bash
for job in "$@"; do kill -- "-$job"; done
"""


def test_slurm_gets_a_job_for_each_worker(text, tmp_path, expected):
    commands, jobs = tmp_path / "commands", tmp_path / "jobs"
    for folder in (commands, jobs):
        folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    target = tmp_path / "data"
    environment = toy_task.environment(JOBS=str(jobs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fairseq_smoe", "prepare"),
            *words(text, target, scheduler="slurm", workers="2", **IN_PIECES),
        ],
        cwd=toy_task.REPOSITORY,
        env={**environment, "PATH": f"{commands}:{environment['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert contents(target) == expected
    started = (jobs / "started").read_text().split()
    assert len(started) == 2
    wait_until(lambda: not any(Path(f"/proc/{job}").exists() for job in started))  # cancelled
