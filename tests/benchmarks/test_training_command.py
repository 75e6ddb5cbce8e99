"""``train``: the command of every row, its batch on any number of processes, and its errors."""

import json
import re
import shlex
import statistics
import sys

import fork_server
import pytest
import toy_task
from fairseq import options as fairseq_options

import fairseq_smoe
from fairseq_smoe.accounting.flops import count_row
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.benchmarks.training_command import (
    batch_tokens,
    model_options,
    split_batch,
    training_command,
    vocab_size,
)
from fairseq_smoe.errors import OptionError
from fairseq_smoe.training.benchmark_row import _precision

ALL = [benchmarks.load(name) for name in benchmarks.PAPERS]
ROWS = [(benchmark, row) for benchmark in ALL for row in benchmark.rows]


def train(*words, check=True, **variables):
    """``python -m fairseq_smoe train``"""
    done = fork_server.run(
        [sys.executable, "-m", "fairseq_smoe", "train", *words],
        env=toy_task.environment(**variables),
        cwd=toy_task.REPOSITORY,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_tables_have_28_rows():
    assert [len(benchmark.rows) for benchmark in ALL] == [9, 12, 7]
    assert len({(benchmark.name, row.slug) for benchmark, row in ROWS}) == 28
    for benchmark, row in ROWS:
        assert benchmark.row(row.name) is row and benchmark.row(row.slug) is row


@pytest.mark.parametrize("benchmark", ALL, ids=lambda benchmark: benchmark.name)
def test_columns_cover_the_directions(benchmark):
    columns = benchmark.columns()
    directions = benchmark.directions()
    assert columns["avg"] == directions
    assert (
        len(set(directions))
        == len(directions)
        == {"m4": 8, "m15": 30, "opus100": 188}[benchmark.name]
    )
    parts = [
        d for name, ds in columns.items() if name != "avg" and not name.endswith("_all") for d in ds
    ]
    assert sorted(parts) == sorted(directions)


@pytest.mark.parametrize("benchmark", ALL, ids=lambda benchmark: benchmark.name)
def test_printed_means_follow_from_the_printed_groups(benchmark):
    columns = benchmark.columns()
    for row in benchmark.rows:
        parts = [c for c in columns if c != "avg" and not c.endswith("_all")]
        weighted = [row.scores[c] for c in parts for _ in columns[c]]
        assert row.scores["avg"] == pytest.approx(statistics.mean(weighted), abs=0.011)


@pytest.mark.parametrize("scale", SCALES)
def test_fairseq_takes_the_command_of_every_row(scale, tmp_path):
    fairseq_smoe.register()
    for benchmark, row in ROWS:
        words = training_command(
            benchmark, row, scale, tmp_path, tmp_path / "run", 7, 1000, 2, ["--lr", "1"]
        )
        assert words[0] == "fairseq-train"
        parsed = fairseq_options.parse_args_and_arch(
            fairseq_options.get_training_parser(), words[1:]
        )
        assert parsed.lr == [1.0]  # what is added overrides
        assert parsed.sampling_temperature == benchmark.temperature
        assert parsed.lang_pairs.split(",") == benchmark.directions()
        assert parsed.label_smoothing == 0.1 and parsed.seed == 7
        assert parsed.skip_invalid_size_inputs_valid_test
        assert parsed.dropout == (0.3 if scale == "paper" else 0)
        assert hasattr(parsed, "smoe_strata") == (row.name != "Dense")


@pytest.mark.parametrize("scale", [name for name in SCALES if name != "paper"])
def test_a_smaller_scale_keeps_the_experts(scale):
    benchmark = benchmarks.load("m4")
    dense, *_ = count_row(benchmark, benchmark.row("dense"), scale)
    paper, *_ = count_row(benchmark, benchmark.row("dense"))
    moe, *_ = count_row(benchmark, benchmark.row("vanilla-moe"), scale)
    assert dense < paper / 10
    embed, ffn = (benchmark.size[n] // SCALES[scale].width for n in ("embed_dim", "ffn_embed_dim"))
    experts = 7 * (2 * embed * ffn + ffn + embed)  # one of 8 is the dense model's FFN
    layers = 2 * (SCALES[scale].layers // 2)
    assert moe - dense == layers * (experts + 8 * embed)


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 25])
def test_the_batch_stays_the_same_on_any_number_of_processes(processes):
    for most in (700, 1000, 4096, 65000):
        tokens, steps = split_batch(13000, processes, most, 512)
        assert 512 <= tokens <= most
        assert 13000 - processes * steps < processes * tokens * steps <= 13000
        assert steps == 1 or -(-13000 // processes // (steps - 1)) > most  # no fewer steps do


def test_a_batch_that_cannot_be_reached():
    with pytest.raises(OptionError, match="32 process.*406 tokens.*at most 25.*16384"):
        split_batch(13000, 32, 4096, 512)
    with pytest.raises(OptionError, match="raise --max-tokens 300"):
        split_batch(13000, 1, 300, 512)
    assert split_batch(131072, 32, 4096, 512) == (4096, 1)  # the authors' run scripts


def test_the_longest_sentence_fits_into_the_share_of_a_step():
    """1000 tokens in steps of at most 600 are two of 500."""
    with pytest.raises(OptionError, match="would take 500 tokens.*raise --max-tokens 600"):
        split_batch(1000, 1, 600, 512)
    assert split_batch(1024, 1, 600, 512) == (512, 2)
    with pytest.raises(OptionError, match="--batch-tokens 0: expected"):
        split_batch(0, 1, 600, 512)


def test_half_precision_unless_another_is_asked_for():
    assert _precision(True, False, ["--lr", "1"]) == ["--fp16"]
    assert _precision(True, True, []) == _precision(True, False, ["--bf16"]) == []
    assert _precision(False, False, ["--bf16"]) == ["--cpu"]


def test_every_option_says_where_it_comes_from():
    for benchmark in ALL:
        for option, (value, source) in benchmark.training.items():
            assert option.startswith("--") and isinstance(value, str)
            assert source.startswith(("paper, ", "the authors' run script", "as for M15: "))
    assert batch_tokens(benchmarks.load("opus100"), "paper") == 65000
    assert vocab_size(benchmarks.load("opus100"), "paper") == 64000
    assert model_options(ALL[1], ALL[1].row("dense"), "paper") == shlex.split(
        "--arch smoe_transformer_big --moe-freq 2 --moe-freq 0"
    )


def test_dry_run_prints_the_command(tmp_path):
    done = train(
        *("m4", "MoE+EOM", "--scale", "small", "--runs", tmp_path, "--dry-run", "--lr", "1e-3"),
        WORLD_SIZE="1",
    )
    words = shlex.split(done.stdout)
    assert words[0] == "fairseq-train" and words[-3:] == ["--lr", "1e-3", "--cpu"]
    assert words[words.index("--moe-eom") + 1] == "0.1"
    assert "1 process(es) x 1000 tokens x 1 step(s) = 1000" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["m5", "dense"], "m5: no such benchmark; choose one of m4, m15, opus100"),
        (["m4", "smoe-4-12"], "smoe-4-12: M4 has no such row; choose one of dense, vanilla-moe"),
        (["m4", "dense"], "holds no prepared text; make it with: bash data-prep/m4.sh"),
        (["m4", "dense", "--update-freq", "3"], "--update-freq: follows from --batch-tokens"),
        (["m4", "dense", "--batch-size", "9"], "--batch-size: follows from --batch-tokens"),
        (["m4", "dense", "--max-source-positions"], "--max-source-positions None: expected a num"),
        (["m4", "dense", "--max-tokens", "100"], "--batch-tokens 13000: .*raise --max-tokens 100"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path):
    done = train(*words, "--data", tmp_path / "none", "--run", tmp_path / "run", check=False)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert not (tmp_path / "run").exists()


def test_a_folder_is_for_one_training(tmp_path):
    facts = {"benchmark": "m4", "row": "Dense", "scale": "paper", "seed": 42, "batch_tokens": 13000}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    done = train("m4", "vanilla-moe", "--run", tmp_path, "--cpu", "--dry-run", check=False)
    assert "was trained with row Dense, not Vanilla MoE" in done.stderr
    done = train("m4", "dense", "--run", tmp_path, "--cpu", "--dry-run")
    assert "fairseq-train" in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-updates", "80"], "fairseq-train: unrecognized arguments: --max-updates 80"),
        (["--smoe-strata", "2-x"], "--smoe-strata '2-x': expected"),
    ],
)
def test_a_mistake_costs_nothing_of_an_earlier_training(options, message, tmp_path):
    facts = {"benchmark": "m4", "row": "SMoE-4-4", "scale": "tiny", "seed": 42}
    facts |= {"batch_tokens": 650, "data": "/elsewhere"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    words = ("m4", "smoe-4-4", "--scale", "tiny", "--cpu", "--run", tmp_path)
    done = train(*words, *options, check=False)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith(f"error: {message}")
    assert json.loads((tmp_path / "run.json").read_text()) == facts
