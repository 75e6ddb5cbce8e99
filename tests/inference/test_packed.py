"""A packed model: all that translation needs, in one folder."""

import json
import subprocess
import sys

import pytest
import toy_task

from fairseq_smoe import Translator
from fairseq_smoe.__main__ import main
from fairseq_smoe.errors import OptionError


@pytest.fixture(scope="module")
def packed(spoken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "model"
    main(["pack", str(spoken), "--to", str(folder), "--license", "mit", "--name", "Toy"])
    return folder


def test_it_translates_without_anything_else(packed, spoken_data, generated, tmp_path):
    """In a process that knows neither the training's folder nor its data."""
    own = generated["en-aa"]
    script = (
        "import json, sys; from fairseq_smoe import Translator\n"
        "t = Translator.load(sys.argv[1]); texts = json.load(sys.stdin)\n"
        "print(json.dumps([t.languages, t.directions,\n"
        "    [r.text for r in t.translate(texts, 'en', 'aa')]]))"
    )
    moved = packed.rename(tmp_path / "elsewhere")
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, moved],
            input=json.dumps(own.sources),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**toy_task.environment(), "PYTHONPATH": str(toy_task.REPOSITORY)},
        )
        assert done.returncode == 0, done.stderr
        languages, directions, lines = json.loads(done.stdout.splitlines()[-1])
        assert languages == ["aa", "bb", "en"] and lines == own.lines
        assert [tuple(d) for d in directions] == [tuple(d.split("-")) for d in toy_task.DIRECTIONS]
        for path in moved.iterdir():
            if path.name != "README.md":
                assert str(spoken_data).encode() not in path.read_bytes()
    finally:
        moved.rename(packed)


@pytest.mark.parametrize("name", ["dense", "cmr", "hmoe", "mpoe", "xmoe"])
def test_every_kind_of_model_can_be_packed(name, spoken_data, tmp_path):
    toy_task.train(spoken_data, tmp_path, *toy_task.MODELS[name], max_update=20)
    checkpoint = tmp_path / "checkpoint_last.pt"
    main(["pack", str(checkpoint), "--to", str(tmp_path / "packed")])
    texts = ["en1 en2", "en3", "en4 en5 en6 en7"]
    both = [Translator.load(path) for path in (checkpoint, tmp_path / "packed")]
    plain, packed = [
        [(r.text, r.hypotheses[0].score) for r in t.translate(texts, "en", "bb", with_scores=True)]
        for t in both
    ]
    assert plain == packed


def test_the_card_tells_what_the_model_is(packed, spoken):
    card = (packed / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert "license: mit\n" in front and "- aa\n- bb\n- en\n" in front
    assert body.startswith("\n# Toy\n") and "strata 2-2-2-2 (encoder: every 2 layers" in body
    assert "| updates | 400 |" in body


def test_the_card_has_the_scores_and_the_command_of_the_training(spoken, tmp_path):
    run = tmp_path / "run"
    (run / "evaluation" / "test").mkdir(parents=True)
    scores = {"directions": {"en-aa": {"bleu": 91.234, "chrf++": 95.0}}}
    (run / "evaluation" / "test" / "scores.json").write_text(json.dumps(scores))
    (run / "run.json").write_text(json.dumps({"command": ["fairseq-train", "a b"]}))
    main(["pack", str(spoken), "--to", str(tmp_path / "model"), "--run", str(run)])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| en-aa | 91.2 | 95.0 |" in card and "    fairseq-train 'a b'\n" in card


def test_damage_is_found(packed, capsys):
    main(["pack", str(packed), "--verify"])
    assert "all checksums agree" in capsys.readouterr().out
    weights = packed / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(SystemExit, match="model.safetensors: is not what was packed"):
        main(["pack", str(packed), "--verify"])
    weights.write_bytes(good[:1000])
    with pytest.raises(OptionError, match="is damaged"):
        Translator.load(packed)
    weights.write_bytes(good)
    config = packed / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(OptionError, match="format 9, and this version reads up to 1"):
        Translator.load(packed)
    config.write_text("{")
    with pytest.raises(OptionError, match="config.json: is damaged"):
        Translator.load(packed)
    config.write_text(text)
    Translator.load(packed)


def test_mistakes_are_told(packed, spoken, tmp_path):
    for words, message in (
        ([spoken], "--to: give the folder to make"),
        ([spoken, "--to", packed], "exists; give a new folder"),
        ([spoken, "--to", tmp_path / "x", "--license", "My Own"], "--license My Own: expected"),
        ([tmp_path / "none", "--to", tmp_path / "x"], "no such file or folder"),
        ([tmp_path, "--verify"], "has no SHA256SUMS"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["pack", *map(str, words)])
    assert not (tmp_path / "x").exists()
    with pytest.raises(OptionError, match="which needs none; leave it out"):
        Translator.load(packed, data=tmp_path)
