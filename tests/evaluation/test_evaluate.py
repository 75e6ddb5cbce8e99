"""``python -m fairseq_smoe evaluate``: all directions with a model that is loaded once."""

import json
import shutil

import pytest
import torch
import toy_task
from toy_task import DIRECTIONS, generate

from fairseq_smoe.__main__ import main
from fairseq_smoe.files import only_process_in

SIZE = toy_task.SPLIT_SIZES["test"]
BEAM = 4
TEXT_FILES = ("hyp.pieces", "hyp.txt", "ref.pieces", "ref.txt", "src.txt")

# the toy task as a benchmark with the rows of M4
TOY = {
    "like": "m4",
    "title": "Toy",
    "english": "en",
    "languages": [{"code": "aa", "resource": "high"}, {"code": "bb", "resource": "low"}],
    "metric": "bleu",
}


def evaluate(*words, **options):
    """The command in this process, on the CPU."""
    words = [*words, *toy_task.option_list({"processes": 1, "cpu": True, **options})]
    main(["evaluate", *map(str, words)])


def evaluate_own(run, *words, **options):
    """A model of one's own, only translated; in batches of a few sentences."""
    options = {"run": run, "beam": BEAM, "max_tokens": 100, **options}
    evaluate("--no-score", *words, **options)


def error_of(*words, capsys, **options):
    """The line that the command ends with."""
    with pytest.raises(SystemExit) as end:
        evaluate(*words, **options)
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    assert "Traceback" not in capsys.readouterr().err
    return message


@pytest.fixture
def run(data, trained, tmp_path):
    return make_run(tmp_path / "run", trained("smoe"))


def make_run(folder, checkpoint):
    """A folder with a model of one's own."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint_best.pt").symlink_to(checkpoint)
    return folder


@pytest.fixture(scope="module")
def data_with_text(make_once, data, text):
    """The toy data with the text of the test set, as ``prepare`` leaves it."""

    def make(folder):
        shutil.copytree(data, folder, dirs_exist_ok=True)
        for path in text.glob("test.*"):
            shutil.copy(path, folder / f"{path.name}.txt")

    return make_once("data-with-text", make)


@pytest.fixture(scope="module")
def benchmark_run(make_once, trained, data_with_text):
    """``(benchmark file, folder of runs)`` with the trained SMoE as a run of two rows."""

    def make(folder):
        (folder / "toy.json").write_text(json.dumps(TOY))
        for name, row in (("SMoE-2-2-2-2", "smoe-2-2-2-2"), ("Vanilla MoE", "vanilla-moe")):
            run = make_run(folder / f"runs/toy-tiny/{row}-seed42", trained("smoe"))
            facts = {"benchmark": str(folder / "toy.json"), "row": name, "scale": "tiny"}
            facts |= {"seed": 42, "data": str(data_with_text), "command": []}
            (run / "run.json").write_text(json.dumps(facts))

    folder = make_once("benchmark-run", make)
    return folder / "toy.json", folder / "runs"


@pytest.fixture(scope="module")
def translated(make_once, trained, data_with_text):
    """Evaluation folder of all directions, translated in two processes by the real command."""

    def make(folder):
        run = make_run(folder / "run", trained("smoe"))
        toy_task.run(
            *("python", "-m", "fairseq_smoe", "evaluate", "--run", run, "--data", data_with_text),
            *("--beam", BEAM, "--processes", 2, "--cpu", "--no-score"),
        )

    return make_once("translated", make) / "run" / "evaluation" / "test"


def read(folder):
    """``{name: content}`` of the files of all directions; without the seconds."""
    files = {path.name: path.read_bytes() for path in folder.glob("*-*.*")}
    for name in files:
        if name.endswith(".json"):
            files[name] = {**json.loads(files[name]), "seconds": None}
    return files


def lines(folder, direction, ending):
    return (folder / f"{direction}.{ending}").read_text().split("\n")[:-1]


@pytest.mark.parametrize("direction, size", [("en-aa", {}), ("bb-en", {"batch_size": 7})])
def test_the_translations_of_fairseq_generate(direction, size, translated, data, trained, tmp_path):
    """Line by line, in batches of other sizes; and the same requested capacity."""
    capacity = tmp_path / "capacity.json"
    expected = generate(
        data, trained("smoe"), direction, beam=BEAM, requested_capacity_file=capacity, **size
    ).sentences
    found = lines(translated, direction, "hyp.pieces")
    assert found == [expected[i][1] for i in range(SIZE)]
    expected = json.loads(capacity.read_text())
    found = json.loads((translated / f"{direction}.json").read_text())["requested_capacity"]
    assert found == {name: expected[name] for name in ("encoder", "decoder", "layers")}


def test_files_of_a_direction(translated, text, trained):
    for direction in DIRECTIONS:
        source, target = direction.split("-")
        pair = direction if source == "en" else f"{target}-{source}"
        for side, lang in (("src", source), ("ref", target)):
            expected = (text / f"test.{pair}.{lang}").read_text().splitlines()
            assert lines(translated, direction, f"{side}.txt") == expected
        assert lines(translated, direction, "ref.pieces") == expected
        pieces = lines(translated, direction, "hyp.pieces")
        assert lines(translated, direction, "hyp.txt") == [p.replace(" ", "") for p in pieces]
        facts = json.loads((translated / f"{direction}.json").read_text())
        assert facts["direction"] == direction and facts["sentences"] == SIZE
        assert facts["checkpoint"]["num_updates"] == 400
        assert facts["checkpoint"]["size"] == trained("smoe").stat().st_size
        assert facts["settings"]["beam"] == BEAM and facts["settings"]["lenpen"] == 1
    assert not list(translated.glob("*unfinished*"))


def test_translations_do_not_depend_on_batches_or_processes(translated, run, data_with_text):
    evaluate_own(run, data=data_with_text, max_tokens=25)
    assert read(run / "evaluation" / "test") == read(translated)


def test_without_text_the_references_are_put_together_from_pieces(run, data, capsys):
    """With data and directions of the checkpoint; the toy's words have no spaces in front."""
    evaluate_own(run, directions="en-aa")
    folder = run / "evaluation" / "test"
    expected = [line.replace(" ", "") for line in lines(folder, "en-aa", "ref.pieces")]
    assert lines(folder, "en-aa", "ref.txt") == expected
    assert "warning" not in capsys.readouterr().err, "no piece is unknown"


def change_binarised(prefix, change):
    """Write a binarised file anew with the sentences that ``change`` makes of its sentences."""
    from fairseq.data import indexed_dataset

    dataset = indexed_dataset.MMapIndexedDataset(str(prefix))
    sentences = change([dataset[i].clone() for i in range(len(dataset))])
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dataset._index.dtype)
    for sentence in sentences:
        builder.add_item(sentence)
    builder.finalize(f"{prefix}.idx")


def test_unknown_pieces_in_references_are_counted(run, data, tmp_path, capsys):
    unknown = 3

    def change(sentences):
        sentences[2][0] = sentences[5][1] = unknown
        return sentences

    other = shutil.copytree(data, tmp_path / "data")
    change_binarised(other / "test.en-aa.aa", change)
    evaluate_own(run, directions="en-aa", data=other)
    assert "2 of them unknown" in capsys.readouterr().err
    pieces = lines(run / "evaluation" / "test", "en-aa", "ref.pieces")
    assert pieces[2].split()[0] == pieces[5].split()[1] == "<unk>"


def test_scores_of_a_row(benchmark_run, capsys):
    """Two subsets in one call; translated once, scored as often as asked."""
    benchmark, runs = benchmark_run
    words = [
        benchmark,
        "smoe-2-2-2-2",
        "--scale",
        "tiny",
        "--runs",
        runs,
        "--metrics",
        "piece-bleu",
    ]
    words += ["--subset", "test,valid"]
    evaluate(*words, beam=2)
    printed = capsys.readouterr().out
    folder = runs / "toy-tiny" / "smoe-2-2-2-2-seed42" / "evaluation"
    scores = json.loads((folder / "test" / "scores.json").read_text())
    assert scores["subset"] == "test" and scores["row"] == "SMoE-2-2-2-2"
    assert (scores["scale"], scores["seed"], scores["num_updates"]) == ("tiny", 42, 400)
    assert scores["name"] == "smoe-2-2-2-2-seed42"
    assert scores["model"]["parameters"] > 0 and scores["model"]["flops_per_token"] > 0
    assert scores["cleaning"] == "not recorded"  # the data is fairseq-preprocess's
    assert set(scores["directions"]) == set(DIRECTIONS)
    for direction, facts in scores["directions"].items():
        assert facts["piece-bleu"] > 80
        assert f"{facts['piece-bleu']:.2f}" in printed.split(f"| {direction}")[1].split("\n")[0]
    assert (folder / "valid" / "scores.json").exists()

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*-*")}
    evaluate(*words, beam=2)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/*-*")} == before
    assert json.loads((folder / "test" / "scores.json").read_text()) == scores


def test_only_what_is_damaged_is_translated_again(translated, trained, tmp_path, capsys):
    run = make_run(tmp_path / "run", trained("smoe"))
    folder = shutil.copytree(translated, run / "evaluation" / "test")
    expected = read(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    (folder / "en-aa.hyp.txt").write_text("one line\n")
    (folder / "bb-en.ref.txt").unlink()
    (folder / "aa-en.json").write_text('{"direction": "aa-')
    evaluate_own(run, data=translated.parents[2].parent / "data-with-text")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.rpartition("/")[2] for line in warnings] == [
        f"en-aa.hyp.txt: 1 lines, expected {SIZE}; en-aa is translated again",
        f"bb-en.ref.txt: 0 lines, expected {SIZE}; bb-en is translated again",
    ]
    assert read(folder) == expected
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}
    assert [name for name in times if times[name] == after[name]] == ["en-bb.json"]


def test_other_settings_and_checkpoints_do_not_mix(run, data, short_run, capsys):
    """What was made otherwise is made anew, or, if it is not asked for, leaves the scores."""
    folder = run / "evaluation" / "test"
    evaluate_own(run, directions="en-aa,en-bb", beam=1)
    (folder / "scores.json").write_text("{}")
    evaluate_own(run, directions="en-aa", beam=2)
    said = capsys.readouterr().err
    assert "en-aa is translated again: not the same settings as the last time" in said
    assert "en-bb.json: of another checkpoint or with other settings; removed" in said
    assert {path.name for path in folder.glob("*.json")} == {"en-aa.json"}
    evaluate_own(run, directions="en-aa", beam=2, checkpoint=short_run / "checkpoint_last.pt")
    assert (
        "en-aa is translated again: not the same checkpoint as the last time"
        in capsys.readouterr().err
    )
    facts = json.loads((folder / "en-aa.json").read_text())
    assert facts["checkpoint"]["num_updates"] == 30 and facts["settings"]["beam"] == 2


def test_one_process_at_a_time_in_a_folder(run, data, capsys):
    folder = run / "evaluation" / "test"
    folder.mkdir(parents=True)
    with only_process_in(folder):
        message = error_of("--run", run, "--no-score", capsys=capsys)
    assert str(folder) in message and "another process evaluates there" in message
    assert [path.name for path in folder.iterdir()] == [".lock"]


# --------------------------------------------------------------------------------------
# what users get wrong


@pytest.mark.parametrize(
    "words, named",
    [
        (["m5", "dense"], ["m5: no such benchmark", "m4, m15, opus100"]),
        (["m4", "densest"], ["densest", "no such row", "vanilla-moe"]),
        (["m4"], ["m4: give one of its rows", "vanilla-moe"]),
        ([], ["give BENCHMARK ROW", "m4, m15, opus100", "--run"]),
        (["m4", "dense", "--run", "x"], ["--run x", "either this or BENCHMARK ROW"]),
        (["--run", "nowhere"], ["nowhere: no such run", "train"]),
        (["m4", "dense"], ["m4-paper/dense-seed42: no such run", "bash scripts/train.sh m4 dense"]),
        (["--run", "{run}", "--checkpoint", "x.pt"], ["x.pt: no such checkpoint", "best.pt"]),
        (["--run", "{run}", "--subset", "test2"], ["--subset test2", "has test, train, valid"]),
        (["--run", "{run}", "--directions", "aa-bb"], ["no test sentences of aa-bb", "en-aa"]),
        (["--run", "{run}", "--directions", "en-zz"], ["--directions en-zz: zz", "en, aa, bb"]),
        (["--run", "{run}", "--directions", "enaa"], ["--directions enaa", "one hyphen"]),
        (["--run", "{run}", "--data", "nowhere"], ["nowhere: no such folder"]),
        (
            ["--run", "{run}", "--data", "{other}"],
            ["other: its dictionary of", "28 entries", "31", "trained with"],
        ),
        (["--run", "{run}", "--fp16"], ["--fp16", "GPU"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_input(words, named, run, data, tmp_path, capsys):
    if "{other}" in words:
        other = shutil.copytree(data, tmp_path / "other")
        for path in other.glob("dict.*.txt"):
            path.write_text("".join(f"word{i} 1\n" for i in range(21)))
    places = {"run": run, "other": tmp_path / "other"}
    message = error_of(*(word.format(**places) for word in words), capsys=capsys)
    for part in named:
        assert part in message


def test_missing_checkpoint_of_a_run(tmp_path, capsys):
    """From the shell: which command makes it."""
    run = tmp_path / "runs/m4-paper/dense-seed42"
    run.mkdir(parents=True)
    words = ("bash", "scripts/evaluate.sh", "m4", "dense", "--runs", tmp_path / "runs")
    outcome = toy_task.run(*words, check=False)
    assert outcome.returncode == 1 and outcome.stderr.count("\n") == 1
    assert f"{run}/checkpoints/checkpoint_best.pt: no such checkpoint" in outcome.stderr
    assert "train it first: bash scripts/train.sh m4 dense " in outcome.stderr


def test_a_file_that_is_no_checkpoint(run, tmp_path, capsys):
    (tmp_path / "x.pt").write_text("no checkpoint")
    message = error_of("--run", run, "--checkpoint", tmp_path / "x.pt", capsys=capsys)
    assert f"{tmp_path}/x.pt: is damaged, or no checkpoint" in message


def test_checkpoint_of_another_row(benchmark_run, capsys):
    benchmark, runs = benchmark_run
    words = (benchmark, "vanilla-moe", "--scale", "tiny", "--runs", runs)
    message = error_of(*words, capsys=capsys)
    assert "--smoe-strata" in message and "trained with 2-2-2-2" in message
    assert "vanilla-moe of toy has 8" in message


@pytest.mark.parametrize("with_text", [True, False])
def test_empty_reference(with_text, run, data_with_text, data, tmp_path, capsys):
    """In the text, or in the binarised file where there is no text."""
    source = data_with_text if with_text else data
    other = shutil.copytree(source, tmp_path / "data")
    if with_text:
        path = other / "test.en-aa.aa.txt"
        content = path.read_text().splitlines()
        content[6] = " "
        path.write_text("".join(f"{line}\n" for line in content))
    else:
        eos = 2
        change_binarised(
            other / "test.en-aa.aa", lambda old: [*old[:6], torch.tensor([eos]), *old[7:]]
        )
    message = error_of("--run", run, "--data", other, "--directions", "en-aa", capsys=capsys)
    place = "test.en-aa.aa.txt: line 7" if with_text else "test.en-aa.aa.bin: sentence 7"
    assert f"{other}/{place}: the reference is empty" in message


def test_text_that_is_not_that_of_the_binarised_set(run, data_with_text, tmp_path, capsys):
    other = shutil.copytree(data_with_text, tmp_path / "data")
    with open(other / "test.en-bb.en.txt", "a") as handle:
        handle.write("en1\n")
    message = error_of("--run", run, "--data", other, capsys=capsys)
    assert f"test.en-bb.en.txt: {SIZE + 1} lines" in message and f"{SIZE} sentences" in message
