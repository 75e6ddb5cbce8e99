"""Which text ``python -m fairseq_smoe prepare`` cleans, what it says of it, and of long lines."""

import argparse
import json
import re

import pytest
import toy_task
from fairseq.data import indexed_dataset
from prepared_folder import contents, run, write_text

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import recorded_cleaning
from fairseq_smoe.commands import prepare, train
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation.plan import make_plan
from fairseq_smoe.training.benchmark_row import plan_training

M4 = {"benchmark": "m4", "pairs": "eng-nso", "splits": "train=train valid=valid test=test"}
# pairs that some rule drops by default
BROKEN = {
    "empty": ("nothing", " "),
    "identical": ("same", "same"),
    "too_long": ("word " * 300, "Wort " * 300),
    "length_ratio": ("a", "bbbbbbbbbb"),
    "held_out": ("Known  sentence", "niemand kennt"),
    "duplicate": ("word1 word2 word3", "Wort1 Wort2 Wort3"),
}


@pytest.fixture
def text(tmp_path):
    """Text with one pair for every rule, and one with a control character."""
    folder = write_text(tmp_path / "text", pair="eng-nso")
    more = [*BROKEN.values(), BROKEN["duplicate"], ("bell\x07rings", "es klingelt")]
    for i, lang in enumerate(("eng", "nso")):
        with open(folder / f"train.eng-nso.{lang}", "a") as handle:
            handle.writelines(f"{pair[i]}\n" for pair in more)
    with (
        open(folder / "test.eng-nso.eng", "a") as eng,
        open(folder / "test.eng-nso.nso", "a") as nso,
    ):
        eng.write("known SENTENCE\n")
        nso.write("bekannt\n")
    return folder


def training_text(target, pair="eng-nso"):
    """The sides of the training text that is binarised, from ``work``."""
    return [
        (target / f"work/clean/train.{pair}.{lang}").read_text().splitlines()
        for lang in pair.split("-")
    ]


def lines_of(target):
    report = json.loads((target / "report.json").read_text())
    facts = report["pairs"]["eng-nso"]
    dropped = {rule: count["lines"] for rule, count in facts["dropped"].items() if count["lines"]}
    return report, facts, dropped


@pytest.mark.parametrize("name", benchmarks.PAPERS)
def test_the_papers_benchmarks_are_the_published_text(name):
    assert benchmarks.load(name).clean == "none"


def test_a_study_says_how_its_text_was_prepared():
    path = toy_task.REPOSITORY / "results/study/study-m4.json"
    assert json.loads(path.read_text())["clean"] == "default"


def test_a_benchmark_keeps_what_was_published_and_counts_the_overlap(text, tmp_path, capsys):
    target = tmp_path / "data"
    run(text, target, **M4)
    overlap = "1 of the 307 pairs kept (0.33%) have a side that is also in the validation or test"
    assert f"clean: {overlap}" in capsys.readouterr().out
    for lang, lines in zip(("eng", "nso"), training_text(target)):
        given = (text / f"train.eng-nso.{lang}").read_text().split("\n")[:-1]
        del given[300]  # the empty side
        assert lines == [line.replace("\x07", " ").strip() for line in given]
        data = indexed_dataset.make_dataset(str(target / f"train.eng-nso.{lang}"), impl="mmap")
        assert len(data) == 307
    report, facts, dropped = lines_of(target)
    assert dropped == {"empty": 1} and facts["kept_in_held_out"]["lines"] == 1
    assert facts["repaired_lines"] == 1
    assert report["cleaning"] == recorded_cleaning(target) == "none"
    page = (target / "report.md").read_text()
    assert "Cleaning: none." in page and overlap in page
    assert "1 lines of all splits had control characters" in page


def test_cleaning_is_one_option_away_and_never_mixed(text, tmp_path):
    target, fresh = tmp_path / "data", tmp_path / "fresh"
    run(text, target, **M4)
    before = contents(target)
    refusal = "--clean default: .* begun with --clean none; give that again, .* --redo clean"
    with pytest.raises(OptionError, match=refusal):
        run(text, target, **M4, clean="default")
    with pytest.raises(OptionError, match="--duplicates drop: .* begun with --duplicates keep"):
        run(text, target, **M4, duplicates="drop")
    assert contents(target) == before
    run(text, target, **M4, clean="default", redo="clean")
    run(text, fresh, **M4, clean="default")
    assert contents(target) == contents(fresh)
    _, facts, dropped = lines_of(target)
    assert dropped == dict.fromkeys(BROKEN, 1)
    assert facts["kept_in_held_out"]["lines"] == 0
    run(text, target, **M4, duplicates="drop", redo="clean")
    assert lines_of(target)[2] == {"empty": 1, "duplicate": 1}
    assert recorded_cleaning(target) == "none with --duplicates drop"


def test_text_of_ones_own_is_cleaned(text, tmp_path):
    run(text, tmp_path / "data", pairs="eng-nso", steps="fetch verify clean")
    assert recorded_cleaning(tmp_path / "data") == "default"
    assert len(training_text(tmp_path / "data")[0]) == 302
    run(text, tmp_path / "all", pairs="eng-nso", steps="fetch verify clean", clean="none")
    assert len(training_text(tmp_path / "all")[0]) == 307


@pytest.mark.parametrize(
    "clean, cleaning, lines",
    [
        (None, "default", 302),
        ("none", "none", 307),
        (
            {"duplicates": "keep", "max_length": 0},
            "default with --max-length 0 --duplicates keep",
            304,
        ),
    ],
)
def test_a_benchmark_of_ones_own_says_what_is_cleaned(clean, cleaning, lines, text, tmp_path):
    """Without a word on it, by the default rules, whatever benchmark it is like."""
    path = tmp_path / "own.json"
    own = {"like": "m4", "title": "Own", "languages": [{"code": "nso", "resource": "low"}]}
    path.write_text(json.dumps(own if clean is None else {**own, "clean": clean}))
    options = {**M4, "benchmark": str(path), "steps": "fetch verify clean"}
    run(text, tmp_path / "data", **options)
    assert recorded_cleaning(tmp_path / "data") == cleaning
    assert len(training_text(tmp_path / "data")[0]) == lines


def test_a_folder_of_an_earlier_version_goes_on_as_it_was_prepared(text, tmp_path):
    """It has the rules on record, but not that they are those of a named cleaning."""
    target = tmp_path / "data"
    options = {**M4, "clean": "default"}
    run(text, target, **options, steps="fetch verify clean")
    record = json.loads((target / "steps.json").read_text())
    del record["clean"]["options"]["cleaning"]
    (target / "steps.json").write_text(json.dumps(record))
    assert recorded_cleaning(target) == "default"
    with pytest.raises(OptionError, match="--clean none: .* begun with --clean default"):
        run(text, target, **M4)
    run(text, target, **options)
    run(text, tmp_path / "fresh", **options)
    assert contents(target) == contents(tmp_path / "fresh")
    assert recorded_cleaning(tmp_path) is None


def plan_of(*words):
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return make_plan(parser.parse_args(["--to", "data", *words]))


def test_the_corpora_of_a_recipe_are_not_the_papers():
    assert plan_of("--benchmark", "m4", "--recipe", "list.txt").cleaning == "default"
    assert plan_of("--benchmark", "m4").cleaning == "none"


def test_a_training_keeps_how_its_text_was_cleaned(text, tmp_path):
    run(text, tmp_path / "data", **M4, steps="fetch verify clean")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    for data, cleaning in (("data", "none"), ("other", None)):
        words = ["m4", "dense", "--cpu", "--run", str(tmp_path / "run")]
        args = parser.parse_args([*words, "--data", str(tmp_path / data)])
        args.more = []
        assert plan_training(args).facts["cleaning"] == cleaning


# --------------------------------------------------------------------------------------
# lines that are too long for a model


LENGTHS = [5, 1021, 1022, 1023, 1024, 6002]
SHORT = [5] * 6


def test_long_lines_are_named_and_kept(tmp_path, capsys):
    """Those that training leaves out, as the sentence's end and a language's token are added."""
    text, target = write_text(tmp_path / "text"), tmp_path / "data"
    sides = {"valid": (LENGTHS, SHORT), "test": (SHORT, SHORT), "train": (LENGTHS, LENGTHS[::-1])}
    for split, lengths in sides.items():
        for i, (lang, word) in enumerate((("en", "word "), ("de", "Wort "))):
            with open(text / f"{split}.en-de.{lang}", "a") as handle:
                handle.writelines(word * n + "\n" for n in lengths[i])
    run(text, target, clean="none", **{"lines-per-shard": "100"})
    dataset = indexed_dataset.make_dataset(str(target / "valid.en-de.en"), impl="mmap")
    sizes = [len(dataset[i]) for i in range(len(dataset))]  # pieces and the end
    expected = [(i + 1, size - 1) for i, size in enumerate(sizes) if size + 1 > 1024]
    found = re.findall(
        r"warning: (\S+): line (\d+) \(valid, en-de\) has ([\d,]+) pieces", capsys.readouterr().err
    )
    assert {path for path, *_ in found} == {str(text / "valid.en-de.en")}
    assert [(int(n), int(p.replace(",", ""))) for _, n, p in found] == expected
    assert expected == [(24, 1023), (25, 1024), (26, 6002)]
    report = json.loads((target / "report.json").read_text())
    assert report["too_long"]["held_out"] == [
        {"split": "valid", "pair": "en-de", "file": "valid.en-de.en", "line": n, "pieces": p}
        for n, p in expected
    ]
    assert (
        f"* valid.en-de.en, line {expected[0][0]} (valid, en-de)"
        in (target / "report.md").read_text()
    )
    assert report["pairs"]["en-de"]["too_long"] == 6  # each long on one side
    task = toy_task.set_up(target, "--skip-invalid-size-inputs-valid-test", lang_pairs="en-de")[1]
    task.load_dataset("valid")
    dataset = task.datasets["valid"]
    _, refused = dataset.filter_indices_by_size(dataset.ordered_indices(), task.max_positions())
    assert len(refused) == len(expected)


def test_a_long_line_behind_one_that_is_dropped(tmp_path, capsys):
    """The number is that in the text beside the binary files, which the warning then names."""
    text, target = write_text(tmp_path / "text"), tmp_path / "data"
    for lang in ("en", "de"):
        path = text / f"test.en-de.{lang}"
        path.write_bytes(b"caf\xe9\n" + path.read_bytes() + b"word " * 1100 + b"\n")
    run(text, target, **{"invalid-utf8": "drop"})
    named = re.findall(r"warning: (\S+): line (\d+) \(test", capsys.readouterr().err)
    assert named == [(str(target / f"test.en-de.{lang}.txt"), "21") for lang in ("en", "de")]
    for path, number in named:
        with open(path) as lines:
            assert list(lines)[int(number) - 1].count("word") == 1100
