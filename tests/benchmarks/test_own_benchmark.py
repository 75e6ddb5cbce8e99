"""A benchmark of the user's own, as a JSON file."""

import json
import shlex

import pytest

from fairseq_smoe.__main__ import main
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.training_command import model_options
from fairseq_smoe.errors import OptionError

OWN = {
    "like": "m4",
    "title": "Own",
    "english": "en",
    "languages": [{"code": "lv", "resource": "high"}, {"code": "lt", "resource": "low"}],
}


@pytest.fixture
def write(tmp_path):
    """``write(name, **fields)``: the path of a file that has these besides those of ``OWN``."""

    def to_file(name="own", **fields):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**OWN, **fields}), encoding="utf-8")
        return str(path)

    return to_file


def test_what_is_left_out_comes_from_the_benchmark_it_is_like(write):
    own = benchmarks.load(write(training={"--lr": ["1", "mine"]}, size={"embed_dim": 256}))
    m4 = benchmarks.load("m4")
    assert own.training == {**m4.training, "--lr": ["1", "mine"]}
    assert own.size == {**m4.size, "embed_dim": 256}
    assert own.directions() == ["en-lv", "en-lt", "lv-en", "lt-en"]
    assert own.columns()["avg"] == own.directions()
    assert own.row("moe-eom").options == m4.row("moe-eom").options and not own.row("dense").scores


def test_its_size_reaches_the_model(write):
    size = {"layers": 4, "embed_dim": 256, "ffn_embed_dim": 512, "attention_heads": 2}
    own = benchmarks.load(write(size=size))
    for scale, expected in (("paper", (4, 256, 512, 2)), ("tiny", (2, 32, 64, 1))):
        words = model_options(own, own.row("dense"), scale)
        layers, embed, ffn, heads = map(str, expected)
        assert shlex.join(words).endswith(
            f"--encoder-layers {layers} --decoder-layers {layers} --encoder-embed-dim {embed} "
            f"--encoder-ffn-embed-dim {ffn} --encoder-attention-heads {heads} "
            f"--decoder-attention-heads {heads} --moe-freq 0"
        )


def test_rows_may_have_names_in_any_script(write):
    rows = [{"name": name, "options": "--moe-freq 0"} for name in ("Плотная", "Смесь 8")]
    own = benchmarks.load(write(rows=rows))
    assert own.row("Смесь 8").slug == "смесь-8"
    assert own.row("смесь-8") is own.rows[1]
    with pytest.raises(OptionError, match="плотная, смесь-8"):
        own.row("Mixture")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"like": "m5"}, "like m5: choose one of m4"),
        ({"training": {"--lr": "1"}}, r'training --lr: expected \["VALUE"'),
        ({"size": {"layers": "6"}}, "size layers 6: expected a number"),
        ({"batch_tokens": "13000"}, "batch_tokens 13000: expected a number"),
        ({"languages": OWN["languages"] * 2}, "languages: lv stands there 2 times"),
        ({"english": "lv"}, "languages: lv stands there 2 times"),
        ({"rows": [{"name": "A+B", "options": ""}, {"name": "a b", "options": ""}]}, "rows: a-b"),
        ({"rows": [{"name": "?", "options": ""}]}, "rows: one has no letter"),
        ({"rows": [{"name": "A", "options": "'"}]}, "row A: options ': No closing"),
        ({"columns": ["en-xxx_hihg", "avg"]}, "columns: en-xxx_hihg is no direction"),
        ({"columns": ["en-de", "avg"]}, "columns: en-de is no direction"),
        ({"training": {"--max-source-positions": ["x", ""]}}, "training --max-source-positions x:"),
        ({"clean": "nothing"}, "clean nothing: expected none or default, or"),
        ({"clean": ["none"]}, r"clean \['none'\]: expected none or default"),
        ({"clean": {"duplicate": "keep"}}, "clean: duplicate is none of .*duplicates"),
        ({"clean": {"duplicates": "no"}}, "clean duplicates no: expected drop or keep"),
        ({"clean": {"max_length": -1}}, "clean max_length -1: expected a number from 0"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(fields, message, write):
    with pytest.raises(OptionError, match=rf"own\.json: {message}"):
        benchmarks.load(write(**fields))


def test_a_file_that_is_none(write, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "list.json").write_text("[1]")
    for name, message in (
        ("folder", "Is a directory"),
        ("list", "expected an object"),
        ("missing", "No such file"),
    ):
        with pytest.raises(OptionError, match=f"{name}.json: {message}"):
            benchmarks.load(str(tmp_path / f"{name}.json"))
    # its runs would stand beside the paper's scores
    with pytest.raises(OptionError, match="m4 exists already"):
        benchmarks.load(write("m4"))


def test_remedies_name_the_file(write, tmp_path):
    path = write()
    with pytest.raises(SystemExit, match=f"prepare --benchmark {path} --from TEXT"):
        main(["train", path, "dense", "--cpu", "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=f"scripts/train.sh {path} dense"):
        main(["evaluate", path, "dense", "--runs", str(tmp_path)])


def test_without_a_vanilla_moe_the_first_row_is_the_baseline(write, tmp_path):
    path = write(rows=[{"name": "Dense", "options": "--moe-freq 0"}])
    with pytest.raises(SystemExit, match="no runs"):  # and nothing about --baseline
        main(["tabulate", path, "--runs", str(tmp_path)])
