"""Mistakes in ``export``."""

import sys

import pytest

from fairseq_smoe.__main__ import main


def test_mistakes_are_told(learned, words_data, tmp_path, monkeypatch):
    model, to = learned("strata"), tmp_path / "x"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    tf, ct = ["--format", "transformers"], ["--format", "ctranslate2"]
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    for words, message in (
        ([model, "--format", "onnx", "--to", to], "--format onnx: expected transformers or ct"),
        ([model, *tf, "--to", tmp_path / "full"], "--to .*full: exists; give a new folder"),
        ([model, *tf, "--to", to, "--quantization", "int8"], "--quantization int8: is for"),
        ([model, *ct, "--to", to, "--quantization", "int3"], "--quantization int3: expected int8"),
        ([model, *ct, "--to", to], r"needs the package ctranslate2; .*fairseq-smoe\[ctranslate2\]"),
        ([tmp_path / "none", *tf, "--to", to], "none: no such file or folder"),
        ([model, *tf, "--to", to, "--data", tmp_path / "none"], "--data .*none: no such folder"),
        ([model, *tf, "--to", to, "--license", "My Own"], "--license My Own: expected a name"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", *map(str, words)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_model_that_is_refused_leaves_no_folder(learned, tmp_path):
    pytest.importorskip("ctranslate2")
    words = ["--format", "ctranslate2", "--to", str(tmp_path / "x")]
    with pytest.raises(SystemExit, match="knows dense models only, and this one has experts; use"):
        main(["export", str(learned("strata")), *words])
    assert list(tmp_path.iterdir()) == []
