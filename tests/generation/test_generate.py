"""fairseq-generate: nothing ends it or is dropped, and users see their own words alone."""

import re
import shutil
from collections import defaultdict

import pytest
import toy_task
from toy_task import generate

from fairseq_smoe.__main__ import main

LONGEST = 1024  # tokens of a sentence, with language token and end of sentence


def groups_of(text):
    """``{number of the sentence: {"S": [...], "T": [...], "H": [...], ...}}`` of what is printed,
    without the scores of hypotheses."""
    groups = defaultdict(lambda: defaultdict(list))
    for line in text.split("\n"):
        if match := re.fullmatch(r"([STHDPA])-(\d+)\t(.*)", line):
            kind, number, rest = match.groups()
            groups[int(number)][kind].append(rest.split("\t")[1] if kind in "HD" else rest)
    return groups


def scores_of(group, i=0):
    """Scores of the tokens of a hypothesis."""
    return [float(score) for score in group["P"][i].split()]


def warnings_of(outcome):
    return [line for line in outcome.stderr.splitlines() if line.startswith("warning: ")]


def error_of(outcome):
    assert outcome.returncode == 1
    (error,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in outcome.stderr
    return error


@pytest.fixture(scope="module")
def plain(data, trained):
    """Three hypotheses of every sentence."""
    return generate(data, trained("smoe"), nbest=3, print_alignment="hard")


# --------------------------------------------------------------------------------------
# the language token


def test_the_language_token_is_not_shown(plain):
    assert "__aa__" not in re.sub(r"langtok.*", "", plain.stdout)
    for group in groups_of(plain.stdout).values():
        assert len(group["H"]) == 3
        for i, words in enumerate(group["H"]):
            assert len(scores_of(group, i)) == len(words.split()) + 1
            aligned = [pair.split("-") for pair in group["A"][i].split()]
            assert [int(target) for _, target in aligned] == list(range(len(words.split())))
            assert all(0 <= int(source) < len(group["S"][0].split()) for source, _ in aligned)


def test_the_language_token_is_shown_if_asked_for(data, trained, plain):
    shown = groups_of(
        generate(data, trained("smoe"), "en-aa", "--keep-inference-langtok", nbest=3).stdout
    )
    for number, group in groups_of(plain.stdout).items():
        for kind in "STHD":
            assert shown[number][kind] == [f"__aa__ {line}" for line in group[kind]]
        assert [scores_of(shown[number], i)[1:] for i in range(3)] == [
            scores_of(group, i) for i in range(3)
        ]


def test_prefix_size_counts_words(uneven, trained):
    """The reference is not what the model says."""
    checkpoint = trained("smoe")
    for size, begins in ((1, "aa7 "), (2, "aa7 bb5")):
        groups = groups_of(generate(uneven, checkpoint, prefix_size=size).stdout)
        assert groups[0]["T"] == ["aa7 bb5"] and groups[0]["H"][0].startswith(begins)
        assert groups[4]["H"] == ["aa1 aa6"]
        assert groups[2]["H"] == [""]
        if size == 1:
            assert "bb5" not in groups[0]["H"][0]


def test_limits_of_the_length_count_words(data, trained):
    at_most = groups_of(generate(data, trained("smoe"), max_len_b=1).stdout)
    assert {len(group["H"][0].split()) for group in at_most.values()} == {1}
    at_least = groups_of(generate(data, trained("smoe"), min_len=7, max_len_b=7).stdout)
    assert {len(group["H"][0].split()) for group in at_least.values()} == {7}


def test_a_reference_is_scored_without_the_language_token(data, trained, plain, tmp_path):
    outcome = generate(
        *(data, trained("smoe"), "en-aa", "--score-reference", "--results-path", tmp_path),
        print_alignment="hard",
    )
    printed = (tmp_path / "generate-test.txt").read_text()
    assert "__aa__" not in re.sub(r"langtok.*", "", printed)
    assert "Generate " not in printed + outcome.stdout and "BLEU" not in printed
    means = dict(re.findall(r"H-(\d+)\t(\S+)\t", printed))
    translated, scored = groups_of(plain.stdout), groups_of(printed)
    assert scored.keys() == translated.keys()
    same = 0
    for number, group in scored.items():
        (words,) = group["H"]
        assert [words] == group["D"] == group["T"] == translated[number]["T"]
        scores = scores_of(group)
        assert len(scores) == len(words.split()) + 1
        assert float(means[str(number)]) == pytest.approx(sum(scores) / len(scores), abs=1e-4)
        assert len(group["A"][0].split()) == len(words.split())
        if words == translated[number]["H"][0]:
            same += 1
            assert scores == pytest.approx(scores_of(translated[number]), abs=2e-4)
    assert same > 40


# --------------------------------------------------------------------------------------
# data without a target side


@pytest.fixture(scope="module")
def source_only(data, tmp_path_factory):
    """A data folder with the source side of a test set and its dictionary."""
    folder = tmp_path_factory.mktemp("source-only")
    for name in ("test.en-aa.en.bin", "test.en-aa.en.idx", "dict.en.txt", "langs.txt"):
        shutil.copy(data / name, folder)
    return folder


def test_a_source_alone_is_translated(source_only, trained, plain):
    found = generate(source_only, trained("smoe"))
    groups, expected = groups_of(found.stdout), groups_of(plain.stdout)
    assert groups.keys() == expected.keys()
    for number, group in groups.items():
        assert group.keys() == {"S", "H", "D", "P"}
        assert group["S"] == expected[number]["S"]
        assert group["H"][0] == expected[number]["H"][0]
    assert "BLEU" not in found.stdout
    sampled = groups_of(
        generate(source_only, trained("smoe"), "en-aa", "--sampling", beam=1).stdout
    )
    assert sampled.keys() == expected.keys()


@pytest.mark.parametrize("option", [["--score-reference"], ["--prefix-size", "1"]])
def test_options_that_need_the_target_say_so(option, source_only, trained):
    outcome = generate(source_only, trained("smoe"), "en-aa", *option, check=False)
    assert f"{option[0]}: test en-aa in {source_only} has no target side" in error_of(outcome)


# --------------------------------------------------------------------------------------
# sentences that are too long, or empty


@pytest.fixture(scope="module")
def uneven(text, tmp_path_factory):
    """A test set with sentences of all lengths."""
    folder = tmp_path_factory.mktemp("uneven")
    pairs = [
        ("en1 en2", "aa7 bb5"),
        ("en3 " * 1500, "aa3"),
        ("", "aa4"),
        ("en5", "aa5 " * 1500),
        ("en6 en1", "aa1 aa6"),
    ]
    for lang, side in zip(("en", "aa"), zip(*pairs)):
        (folder / f"test.en-aa.{lang}").write_text("".join(f"{line}\n" for line in side))
    toy_task.run(
        *("fairseq-preprocess", "--source-lang", "en", "--target-lang", "aa"),
        *("--testpref", folder / "test.en-aa", "--destdir", folder / "data"),
        *("--srcdict", text / "dict.txt", "--tgtdict", text / "dict.txt"),
    )
    (folder / "data" / "langs.txt").write_text("\n".join(toy_task.LANGS) + "\n")
    return folder / "data"


@pytest.mark.parametrize("options", [[], ["--truncate-source"]])
def test_no_sentence_ends_it(options, uneven, trained):
    """All of them with --max-tokens that the longest exceeds."""
    outcome = generate(uneven, trained("smoe"), "en-aa", *options, max_tokens=100)
    groups = groups_of(outcome.stdout)
    assert sorted(groups) == [0, 1, 2, 3, 4]
    assert len(groups[1]["S"][0].split()) == LONGEST - 2
    assert groups[2]["H"] == [""] and outcome.sentences[2] == (0, "")
    assert groups[2]["P"] == ["0.0000"]
    assert len(groups[3]["T"][0].split()) == 1500
    assert groups[4]["H"] == ["aa1 aa6"]
    found = warnings_of(outcome)
    if options:  # they are asked for
        assert not found
    else:
        assert len(found) == 1 and "test en-aa, source of S-1: more than the 1024" in found[0]


def test_evaluate_translates_them_alike(uneven, trained, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint_best.pt").symlink_to(trained("smoe"))
    options = {"run": tmp_path, "data": uneven, "directions": "en-aa", "beam": 4, "processes": 1}
    main(["evaluate", *toy_task.option_list(options), "--no-score", "--cpu"])
    found = (tmp_path / "evaluation" / "test" / "en-aa.hyp.pieces").read_text().split("\n")
    expected = groups_of(generate(uneven, trained("smoe")).stdout)
    assert found == [*(expected[i]["H"][0] for i in range(5)), ""]
    assert "test en-aa, line 2: more than the 1024 tokens" in capsys.readouterr().err


def test_references_that_are_too_long_are_scored_to_the_limit(uneven, trained):
    outcome = generate(uneven, trained("smoe"), "en-aa", "--score-reference")
    groups = groups_of(outcome.stdout)
    assert sorted(groups) == [0, 1, 2, 3, 4]
    assert len(groups[3]["H"][0].split()) == LONGEST - 2
    assert groups[2]["H"] == ["aa4"]  # an empty source has a translation to score
    assert "target of S-3: more than the 1024 tokens" in warnings_of(outcome)[1]
    assert "--max-target-positions" in warnings_of(outcome)[1]


def test_what_is_left_out_is_named(uneven, trained):
    options = ["--skip-invalid-size-inputs-valid-test"]
    outcome = generate(uneven, trained("smoe"), "en-aa", *options)
    assert sorted(groups_of(outcome.stdout)) == [0, 2, 4]
    source, target = warnings_of(outcome)
    assert "source of S-1:" in source and "target of S-3:" in target
    assert "left out" in source and "left out" in target


# --------------------------------------------------------------------------------------
# language codes with hyphens


@pytest.fixture(scope="module")
def hyphenated(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hyphenated")
    for path in data.glob("*.*-*.*"):
        shutil.copy(path, folder / path.name.replace("aa", "pt-br"))
    for lang in ("en", "pt-br", "aa", "bb"):
        shutil.copy(data / "dict.en.txt", folder / f"dict.{lang}.txt")
    return folder


def test_codes_with_hyphens_are_refused(hyphenated, trained, tmp_path):
    file = f"{hyphenated}/train.en-pt-br.en.idx: a language code cannot have a hyphen"
    outcome = toy_task.train(hyphenated, tmp_path, lang_pairs=None, check=False)
    assert file in error_of(outcome)
    outcome = toy_task.train(hyphenated, tmp_path, lang_pairs="en-pt-br", check=False)
    assert "--lang-pairs en-pt-br: expected source and target joined by" in error_of(outcome)
    outcome = generate(hyphenated, trained("smoe"), langs="en,aa,bb", check=False)
    assert file.replace("train", "test") in error_of(outcome)
    options = {"target_lang": "pt-br", "langs": "en,pt-br,bb"}
    outcome = generate(hyphenated, trained("smoe"), check=False, **options)
    assert "--target-lang pt-br: a language code cannot have a hyphen" in error_of(outcome)
