"""Scores of evaluation folders, against fairseq-generate's own and sacrebleu's API."""

import json
import random
import re
import subprocess
import sys
from argparse import ArgumentParser

import pytest
import toy_task
from evaluation_folders import TEXT, worse, write_evaluation, write_flores200_model
from sacrebleu.metrics import BLEU, CHRF

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation import scoring
from fairseq_smoe.evaluation.translation_metrics import PieceBleu, bleu, chrf_plus_plus, spbleu


def options(*words):
    parser = ArgumentParser()
    scoring.add_scoring_options(parser)
    return parser.parse_args(words)


@pytest.fixture(scope="session")
def flores200_model(tmp_path_factory):
    return write_flores200_model(tmp_path_factory.mktemp("spm"))


@pytest.fixture
def folder(tmp_path):
    """RUN/evaluation/test with two directions."""
    translations = {
        "eng-nso": (worse(TEXT, 0.2), TEXT),
        "nso-eng": (worse(TEXT[:50], 0.4), TEXT[:50]),
    }
    facts = {"benchmark": "m4", "row": "Dense", "scale": "small", "seed": 3, "data": "/data"}
    return write_evaluation(tmp_path / "dense-seed3", translations, run_facts=facts)


# --------------------------------------------------------------------------------------
# BLEU over pieces


def pieces_of_generation(outcome):
    """``(hypotheses, references)`` in the order of the test set, from the lines H- and T-."""
    found = {}
    for kind, pattern in {"H": r"^H-(\d+)\t[^\t]*\t(.*)$", "T": r"^T-(\d+)\t(.*)$"}.items():
        lines = re.findall(pattern, outcome.stdout, re.MULTILINE)
        found[kind] = [text for _, text in sorted(lines, key=lambda line: int(line[0]))]
    # fairseq marks what the dictionary lacks in references only
    return found["H"], [line.replace("<<unk>>", "<unk>") for line in found["T"]]


@pytest.fixture(scope="session")
def data_with_unknown_words(make_once, text):
    """The toy data, whose test set has words that the dictionary lacks."""

    def make(folder):
        lines = {lang: (text / f"test.en-aa.{lang}").read_text() for lang in ("en", "aa")}
        lines["aa"] = lines["aa"].replace("aa3", "unheard")
        for lang, content in lines.items():
            (folder / f"test.en-aa.{lang}").write_text(content)
        toy_task.run(
            *("fairseq-preprocess", "--source-lang", "en", "--target-lang", "aa"),
            *("--testpref", folder / "test.en-aa", "--destdir", folder / "data"),
            *("--srcdict", text / "dict.txt", "--tgtdict", text / "dict.txt"),
        )
        (folder / "data" / "langs.txt").write_text("\n".join(toy_task.LANGS) + "\n")

    return make_once("data-with-unknown-words", make) / "data"


@pytest.mark.parametrize("unknown_words", [False, True])
def test_piece_bleu_is_what_fairseq_generate_prints(
    unknown_words, data, data_with_unknown_words, trained, tmp_path
):
    data = data_with_unknown_words if unknown_words else data
    # a length penalty far off makes mistakes, of which the model makes too few
    outcome = toy_task.generate(data, trained("smoe"), "en-aa", lenpen=-3)
    hypotheses, references = pieces_of_generation(outcome)
    assert len(hypotheses) == len(references) == toy_task.SPLIT_SIZES["test"]
    assert any("<unk>" in line for line in references) == unknown_words
    folder = write_evaluation(tmp_path, {"en-aa": (hypotheses, references)}, as_pieces=True)
    scores = scoring.score_folder(folder, options("--metrics", "piece-bleu"), {})
    assert 5 < outcome.bleu < 100
    assert f"{scores['directions']['en-aa']['piece-bleu']:.2f}" == f"{outcome.bleu:.2f}"
    assert "langtok:yes" in scores["metrics"]["piece-bleu"]


def random_pieces(rng):
    """Some lines of pieces, up to 9 long, of a small vocabulary."""
    return [" ".join(rng.choices("▁abcd", k=rng.randint(0, 9))) for _ in range(60)]


@pytest.mark.parametrize("language_token", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_statistics_of_piece_bleu_give_the_score_of_fairseqs_scorer(seed, language_token):
    rng = random.Random(seed)
    hypotheses, references = random_pieces(rng), random_pieces(rng)
    hypotheses[30:50] = references[30:50]
    hypotheses, references = [
        [line.replace("d", "<unk>") for line in lines] for lines in (hypotheses, references)
    ]
    metric = PieceBleu(language_token)
    sums = metric.statistics(hypotheses, references).sum(axis=0)
    score = metric.corpus_score(hypotheses, references)
    assert score > 0
    assert metric.score_sums(sums) == pytest.approx(score, rel=1e-12)


def test_unknown_pieces_never_match():
    metric = PieceBleu(language_token=False)
    assert metric.corpus_score(["▁a b c d e"], ["▁a b c d e"]) == pytest.approx(100)
    assert metric.corpus_score(["▁a <unk> c d"], ["▁a <unk> c d"]) == 0
    assert metric.corpus_score(["", ""], ["▁a b", "c"]) == 0


def test_piece_bleu_and_its_counts_differ_by_less_than_the_tolerance():
    """fairseq's scorer takes some pairs of pieces for the same that are not."""
    draw = random.Random(1)
    pieces = [[f"{side}{draw.randrange(4000)}" for _ in range(18000)] for side in "ab"]
    same = [f"c{draw.randrange(4000)}" for _ in range(9000)]
    hypotheses, references = (
        [" ".join(same[i::300] + own[i::300]) for i in range(300)] for own in pieces
    )
    metric = PieceBleu()
    counted = metric.score_sums(metric.statistics(hypotheses, references).sum(0))
    assert 0 < metric.corpus_score(hypotheses, references) - counted < metric.tolerance


# --------------------------------------------------------------------------------------
# sacrebleu's metrics


def test_scores_equal_sacrebleus_api(folder, flores200_model):
    scores = scoring.score_folder(folder, options("--flores200-spm", str(flores200_model)), {})
    for direction, found in scores["directions"].items():
        lines = [
            (folder / f"{direction}.{side}.txt").read_text().splitlines() for side in ("hyp", "ref")
        ]
        plain, chrf = BLEU(), CHRF(word_order=2)
        assert found["bleu"] == plain.corpus_score(lines[0], [lines[1]]).score
        assert found["chrf++"] == chrf.corpus_score(lines[0], [lines[1]]).score
        assert scores["metrics"]["bleu"] == str(plain.get_signature())
        assert scores["metrics"]["chrf++"] == str(chrf.get_signature())


def test_spbleu_equals_sacrebleu_with_the_same_model_in_its_cache(
    folder, flores200_model, tmp_path
):
    """By file, from the cache, and by sacrebleu itself."""
    cache = tmp_path / "cache/models"
    cache.mkdir(parents=True)
    (cache / "flores200sacrebleuspm").write_bytes(flores200_model.read_bytes())
    program = (
        "import sys, json\n"
        "from sacrebleu.metrics import BLEU\n"
        "from fairseq_smoe.evaluation.translation_metrics import spbleu\n"
        "lines = [open(p).read().splitlines() for p in sys.argv[1:3]]\n"
        "metrics = BLEU(tokenize='flores200'), spbleu(), spbleu(sys.argv[3])\n"
        "scores = [metrics[0].corpus_score(lines[0], [lines[1]]).score]\n"
        "scores += [metric.corpus_score(*lines) for metric in metrics[1:]]\n"
        "signatures = [str(metrics[0].get_signature()), *(m.signature for m in metrics[1:])]\n"
        "print(json.dumps([scores, signatures]))"
    )
    files = [folder / "eng-nso.hyp.txt", folder / "eng-nso.ref.txt", flores200_model]
    outcome = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        env=toy_task.environment(SACREBLEU=str(tmp_path / "cache")),
        cwd=toy_task.REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    scores, signatures = json.loads(outcome.stdout)
    assert 10 < scores[0] < 90 and scores == [scores[0]] * 3
    assert "tok:flores200" in signatures[0] and signatures[1] == signatures[0]
    # the file's digest is added
    assert re.sub(r"\|spm:[0-9a-f]{8}\|", "|", signatures[2]) == signatures[0] != signatures[2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [bleu, chrf_plus_plus])
def test_statistics_give_sacrebleus_scores(make, seed):
    """Also of few words, in which some n-grams do not occur."""
    rng = random.Random(seed)
    words = ["one", "two", "three", "(four)"]
    lines = [[" ".join(rng.choices(words, k=rng.randint(0, 5))) for _ in range(6)] for _ in "12"]
    lines[1] = [line or "one" for line in lines[1]]
    metric = make()
    rows = metric.statistics(*lines)
    assert metric.score_sums(rows.sum(axis=0)) == pytest.approx(metric.corpus_score(*lines))
    alone = [metric.corpus_score(lines[0][i : i + 1], lines[1][i : i + 1]) for i in range(6)]
    assert metric.score_sums(rows) == pytest.approx(alone)


# --------------------------------------------------------------------------------------
# the folder


def test_scores_file_holds_what_is_known_of_the_run(folder):
    extra = {"model": {"parameters": 5, "flops_per_token": 7.0}, "scale": "tiny"}
    scores = scoring.score_folder(folder, options("--metrics", "bleu", "piece-bleu"), extra)
    assert scores == json.loads((folder / "scores.json").read_text())
    known = {"subset": "test", "benchmark": "m4", "row": "Dense", "scale": "tiny", "seed": 3}
    known |= {"name": "dense-seed3", "num_updates": 70, "settings": {"beam": 5}, **extra}
    assert {key: scores[key] for key in known} == known
    assert scores["metrics"].keys() == {"bleu", "piece-bleu"}
    assert scores["directions"].keys() == {"eng-nso", "nso-eng"}
    numbers = scores["directions"]["nso-eng"]
    assert numbers["sentences"] == 50 and 0 < numbers["bleu"] < 100
    assert numbers["requested_capacity"] == {"encoder": 1.5, "decoder": 1.25}


def test_run_of_ones_own_has_a_name_only(tmp_path):
    folder = write_evaluation(tmp_path / "mine", {"en-de": (TEXT, TEXT)}, run_facts=None)
    scores = scoring.score_folder(folder, options("--metrics", "bleu"), {})
    assert scores["name"] == "mine" and scores["benchmark"] is scores["seed"] is None
    assert scores["directions"]["en-de"]["bleu"] == pytest.approx(100)


def test_lines_end_at_newlines_only(tmp_path):
    """U+2028 and the like are characters of a sentence."""
    lines = ["a b c d e\u2028f g h", "i j k l\x85m n o p"]
    folder = write_evaluation(tmp_path / "mine", {"en-de": (lines, lines)})
    scores = scoring.score_folder(folder, options("--metrics", "bleu", "piece-bleu"), {})
    assert scores["directions"]["en-de"]["piece-bleu"] == pytest.approx(100)


def change_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1 :] = [line, *lines[number:]] if line is not None else []
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    "file, line, message",
    [
        ("eng-nso.ref.txt", "  ", r"eng-nso\.ref\.txt: line 7: the reference is empty"),
        ("eng-nso.ref.pieces", "", r"eng-nso\.ref\.pieces: line 7: the reference is empty"),
        ("nso-eng.hyp.txt", None, r"nso-eng\.hyp\.txt: line 7: 6 lines where .* 50 sentences"),
        ("nso-eng.ref.txt", "x\ny", r"nso-eng\.ref\.txt: line 51: 51 lines where .* 50 sentences"),
    ],
)
def test_damaged_files_are_named_with_the_line(folder, file, line, message):
    change_line(folder / file, 7, line)
    with pytest.raises(OptionError, match=message) as caught:
        scoring.score_folder(folder, options("--metrics", "bleu", "piece-bleu"), {})
    assert "\n" not in str(caught.value)
    assert not (folder / "scores.json").exists()


def test_missing_file_and_empty_folder(folder, tmp_path):
    (folder / "eng-nso.hyp.txt").unlink()
    with pytest.raises(OptionError, match="eng-nso.hyp.txt: no such file; evaluate again"):
        scoring.score_folder(folder, options("--metrics", "bleu"), {})
    with pytest.raises(OptionError, match="holds no translations"):
        scoring.score_folder(tmp_path, options(), {})


def test_directions_of_different_checkpoints_are_refused(folder):
    facts = json.loads((folder / "nso-eng.json").read_text())
    facts["checkpoint"]["num_updates"] += 1
    (folder / "nso-eng.json").write_text(json.dumps(facts))
    with pytest.raises(OptionError, match="eng-nso .*70.*nso-eng .*71.*evaluate again"):
        scoring.score_folder(folder, options("--metrics", "bleu"), {})


# --------------------------------------------------------------------------------------
# what is not there


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """As if sacrebleu had no tokenizer of Flores-200."""
    monkeypatch.setattr(
        "fairseq_smoe.evaluation.translation_metrics.SACREBLEU_DIR", str(tmp_path / "cache")
    )
    return tmp_path / "cache/models/flores200sacrebleuspm"


def test_spbleu_is_left_out_where_nobody_asked_for_it(folder, empty_cache, caplog):
    scores = scoring.score_folder(folder, options(), {})
    assert scores["metrics"].keys() == {"piece-bleu", "bleu", "chrf++"}
    assert "spbleu is left out" in caplog.text and str(empty_cache) in caplog.text


def test_spbleu_that_was_asked_for_says_what_to_put_where(folder, empty_cache, flores200_model):
    with pytest.raises(OptionError) as caught:
        scoring.score_folder(folder, options("--metrics", "spbleu"), {})
    assert f"save it as {empty_cache}" in str(caught.value) and "\n" not in str(caught.value)
    words = options("--metrics", "spbleu", "--flores200-spm", str(flores200_model))
    assert scoring.score_folder(folder, words, {})["metrics"].keys() == {"spbleu"}


def test_wrong_tokenizer_files(folder, tmp_path):
    (tmp_path / "text").write_text("no model")
    for name, message in {"text": "is no SentencePiece model", "none": "no such file"}.items():
        with pytest.raises(OptionError, match=f"--flores200-spm .*{name}: {message}"):
            spbleu(tmp_path / name)


def test_comet_needs_a_model_and_its_package(folder):
    with pytest.raises(OptionError, match="--metrics comet: give a model with --comet"):
        scoring.score_folder(folder, options("--metrics", "comet"), {})
    try:
        import comet  # noqa: F401
    except ImportError:
        with pytest.raises(OptionError, match="--comet x: .*unbabel-comet is missing; pip install"):
            scoring.score_folder(folder, options("--comet", "x"), {})
