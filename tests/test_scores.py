"""Scores, table and picture of translations, on output files as fairseq-generate writes them."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest

from fairseq_smoe import compare
from fairseq_smoe.errors import OptionError
from fairseq_smoe.scores import read_generation, score

REFERENCES = ["the page was deleted", "no orders were found", "please enter a password"]
GENERATION = """\
S-2\t▁bitte ...
T-2\tplease enter a password
H-2\t-0.5\tplease enter the password
D-2\t-0.5\tplease enter the password
P-2\t-0.1 -0.2
T-0\tthe page was deleted
H-0\t-0.7\tthe page was deleted
D-0\t-0.7\tthe page was deleted
T-1\tno orders were found
D-1\t-0.9\t
Generate test with beam=5: BLEU4 = 1.00
"""


@pytest.fixture
def run_folder(tmp_path):
    """A function that makes a run folder whose encoder asks for ``capacity`` passes."""

    def make(name, capacity, directions=("de-en", "en-de")):
        folder = tmp_path / name / "translations"
        folder.mkdir(parents=True)
        for direction in directions:
            (folder / f"{direction}.out").write_text(GENERATION)
            numbers = {"direction": direction, "encoder": capacity, "decoder": 1.0}
            (folder / f"{direction}.json").write_text(json.dumps(numbers))
        return str(tmp_path / name)

    return make


def test_generation_is_read_in_test_set_order(tmp_path):
    path = tmp_path / "en-de.out"
    path.write_text(GENERATION)
    translations, references = read_generation(path)
    assert references == REFERENCES
    assert translations == ["the page was deleted", "", "please enter the password"]


@pytest.mark.parametrize("text", ["", "T-0\tone\n", "T-0\tone\nD-1\t-0.1\tother\n"])
def test_incomplete_generation_is_refused(tmp_path, text):
    path = tmp_path / "en-de.out"
    path.write_text(text)
    with pytest.raises(OptionError, match="en-de.out.*translations"):
        read_generation(path)


def test_missing_sentence_is_named(tmp_path):
    path = tmp_path / "en-de.out"
    path.write_text("T-0\tone\nD-0\t-0.1\tone\nT-2\tthree\nD-2\t-0.1\tthree\n")
    with pytest.raises(OptionError, match="sentence 1 .*not translated"):
        read_generation(path)


def test_scores_equal_the_sacrebleu_command(tmp_path):
    translations = ["the page was deleted", "no order was found", "please enter the password"]
    (tmp_path / "ref").write_text("\n".join(REFERENCES) + "\n")
    (tmp_path / "hyp").write_text("\n".join(translations) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf"]
    command += ["--width", "4"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    bleu, chrf = json.loads(outcome.stdout)
    scores = score(translations, REFERENCES)
    assert scores.bleu == pytest.approx(bleu["score"], abs=1e-4)
    assert scores.chrf == pytest.approx(chrf["score"], abs=1e-4)
    assert bleu["signature"] == scores.bleu_signature
    assert chrf["signature"] == scores.chrf_signature
    assert "eff:no" in scores.bleu_signature


def test_perfect_translation_scores_100():
    scores = score(REFERENCES, REFERENCES)
    assert scores.bleu == pytest.approx(100) and scores.chrf == pytest.approx(100)


def test_compare_writes_table_scores_and_picture(run_folder, tmp_path, capsys):
    runs = [run_folder("SMoE-2-2", 1.5), run_folder("MoE-4", 1.0)]
    compare.run(Namespace(runs=runs, to=str(tmp_path / "out")))
    table = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out == table
    header, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    assert header[:6] == ["direction", "SMoE-2-2: BLEU", "chrF", "RC enc", "RC dec", "MoE-4: BLEU"]
    assert [row[0] for row in rows] == ["en-de", "de-en", "mean"]
    assert rows[-1][3:5] == ["1.50", "1.00"] and rows[-1][7:] == ["1.00", "1.00"]
    assert rows[-1][1:3] == rows[0][1:3] == rows[0][5:7]
    assert "version:" in json.loads((tmp_path / "out" / "scores.json").read_text())["MoE-4"][
        "en-de"
    ]["bleu_signature"]
    assert (tmp_path / "SMoE-2-2/translations/en-de.ref").read_text().splitlines() == REFERENCES
    pictures = [path.name for path in (tmp_path / "out").glob("*.png")]
    assert pictures == ["requested-capacity-SMoE-2-2.png"]


def test_models_with_other_directions_are_refused(run_folder, tmp_path):
    runs = [run_folder("one", 1.5), run_folder("two", 1.0, directions=("en-de",))]
    with pytest.raises(OptionError, match="one and two.*de-en"):
        compare.run(Namespace(runs=runs, to=str(tmp_path)))


def test_table_and_picture_need_no_fairseq():
    program = (
        "import sys, fairseq_smoe.scores, fairseq_smoe.compare, fairseq_smoe.catalogues\n"
        "assert 'fairseq' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
