"""``python -m fairseq_smoe checkpoint`` on checkpoints that fairseq-train has written, and what
fairseq's commands make of its outputs."""

import json
import multiprocessing
import re
import shutil
import sys

import pytest
import torch
import toy_task
from omegaconf import OmegaConf
from toy_task import MODELS, Outcome, generate, run, train

from fairseq_smoe import __main__
from fairseq_smoe.checkpoints import transform
from fairseq_smoe.checkpoints.parts import REFERENCE, read_checkpoint


def checkpoint(*words):
    return run("python", "-m", "fairseq_smoe", "checkpoint", *words)


@pytest.fixture
def checkpoint_again(tmp_path_factory):
    """The same, in a fork of this process, which has imported torch: that takes most of the time.

    ``checkpoint_again(*words, check=True)`` returns an ``Outcome``.
    """
    folder = tmp_path_factory.mktemp("printed")

    def run_fork(*words, check=True):
        command = ["checkpoint", *map(str, words)]
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=run_main, args=(command, folder))
        process.start()
        process.join()
        printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
        outcome = Outcome(command, process.exitcode, *printed)
        assert not check or outcome.returncode == 0, outcome.tail()
        return outcome

    return run_fork


def run_main(command, folder):
    sys.stdout, sys.stderr = (open(folder / name, "w") for name in ("stdout", "stderr"))
    __main__.main(command)


def refusal(outcome):
    """The only line on stderr of a command that does nothing."""
    assert outcome.returncode not in (0, None) and not outcome.stdout, outcome.tail()
    assert re.fullmatch(r"error: [^\n]+\n", outcome.stderr), outcome.tail()
    return outcome.stderr


def parts_of(path):
    """Files with the experts of a checkpoint."""
    reference = torch.load(path, weights_only=False)[REFERENCE]
    found = sorted((path.parent / reference["folder"]).iterdir())
    assert len(found) == reference["parts"]
    return found


def flip(path, position):
    """Damage one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def assert_same_state(path, other):
    """All that is in two checkpoints in one piece is equal, to the last bit."""
    first, second = (torch.load(file, weights_only=False) for file in (path, other))
    assert first["model"] and first["last_optimizer_state"]["state"]
    assert_same(first, second, "state")


def assert_same(one, other, name):
    assert type(one) is type(other), name
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key, value in one.items():
            assert_same(value, other[key], f"{name}: {key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    else:
        assert one == other, name


@pytest.fixture(scope="module")
def forms(make_once, short_run):
    """A checkpoint ``original.pt`` of 30 updates, and what the command makes of it: ``split.pt`` in
    4 parts, ``merged.pt`` of that, and ``stripped.pt``."""

    def make(folder):
        shutil.copyfile(short_run / "checkpoint_last.pt", folder / "original.pt")
        checkpoint("split", folder / "original.pt", folder / "split.pt", "--parts", 4)
        checkpoint("merge", folder / "split.pt", folder / "merged.pt")
        checkpoint("strip", folder / "original.pt", folder / "stripped.pt")

    return make_once("checkpoint-forms", make)


@pytest.fixture(scope="module")
def saved(make_once, data):
    """A training that has kept checkpoints of its updates 5, 10 and 15."""

    def make(folder):
        train(
            data,
            folder,
            *MODELS["smoe"],
            max_update=15,
            save_interval_updates=5,
            keep_interval_updates=3,
            disable_validation=True,
        )

    return make_once("interval-checkpoints", make)


# --------------------------------------------------------------------------------------
# in parts, and in one piece


def test_split_and_merge_lose_nothing(forms):
    assert_same_state(forms / "original.pt", forms / "merged.pt")
    parts = parts_of(forms / "split.pt")
    assert [part.name for part in parts] == [f"part-{r}-of-4.pt" for r in range(4)]
    original = torch.load(forms / "original.pt", weights_only=False)["model"]
    for r, part in enumerate(parts):
        for name, experts in torch.load(part, weights_only=False)["model"].items():
            assert torch.equal(experts, original[name][r::4]), "the experts r, r + 4, ..."
    total = sum(file.stat().st_size for file in [forms / "split.pt", *parts])
    assert total < 1.05 * (forms / "original.pt").stat().st_size, "nothing is written twice"


def test_inspect_says_what_is_in_it(forms, data):
    outcome = checkpoint("inspect", forms / "split.pt", forms / "stripped.pt", "--json")
    facts = json.loads(outcome.stdout)
    assert list(facts) == [f"{forms}/split.pt", f"{forms}/stripped.pt"]
    split = facts[f"{forms}/split.pt"]
    model = toy_task.set_up(data, *MODELS["smoe"])[2]
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    record = toy_task.Outcome([], 0, (forms / "../short-run/stdout").read_text(), "").log("valid")
    validation_loss = record[-1]["valid_loss"]
    assert split == {
        "architecture": "smoe_transformer_tiny",
        "experts": "strata 2-2-2-2",
        "expert blocks": 2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "of experts": sum(p.numel() for p in experts),
        "parts": 4,
        "type": "float32",
        "updates": 30,
        "epoch": 1,
        "validation loss": validation_loss,
        "best so far": validation_loss,
        "optimizer": "FairseqAdam",
    }
    assert facts[f"{forms}/stripped.pt"] == {**split, "parts": 1, "optimizer": "none"}

    path, *lines = checkpoint("inspect", forms / "split.pt").stdout.splitlines()
    assert path == f"{forms}/split.pt"
    table = dict(re.fullmatch(r"  (\S+(?: \S+)*)  +(\S.*)", line).groups() for line in lines)
    assert table == {name: str(value) for name, value in split.items()}


def test_files_are_made_in_the_place_of_their_inputs(forms, tmp_path, checkpoint_again):
    """And the experts of the old file go with it, unless another file needs them."""
    path, copy = tmp_path / "new folder" / "here" / "checkpoint.pt", tmp_path / "copy.pt"
    checkpoint_again("split", forms / "original.pt", path, "--parts", 2)
    two = path.parent / torch.load(path, weights_only=False)[REFERENCE]["folder"]
    checkpoint_again("split", path, path, "--parts", 8)
    eight = parts_of(path)
    assert len(eight) == 8 and not two.exists()

    copy = path.with_name("copy.pt")
    shutil.copyfile(path, copy)
    checkpoint_again("merge", path, path)
    assert_same_state(path, forms / "original.pt")
    assert parts_of(copy) == eight, "the copy needs them"
    checkpoint_again("strip", copy, copy)
    assert sorted(file.name for file in path.parent.iterdir()) == ["checkpoint.pt", "copy.pt"]
    assert copy.stat().st_size == (forms / "stripped.pt").stat().st_size


def resumed(data, folder, restore_file):
    outcome = train(
        data, folder, *MODELS["smoe"], restore_file=restore_file, max_update=34, log_interval=1
    )
    found = [(record["num_updates"], record["loss"]) for record in outcome.log("train_inner")]
    assert [number for number, _ in found] == [31, 32, 33, 34], outcome.tail()
    return found


def test_a_training_goes_on_from_every_form(forms, data, tmp_path):
    expected = resumed(data, tmp_path / "1", forms / "original.pt")
    assert resumed(data, tmp_path / "2", forms / "split.pt") == expected
    assert resumed(data, tmp_path / "3", forms / "merged.pt") == expected


def test_every_form_translates_identically(forms, data):
    expected = generate(data, forms / "original.pt", beam=2).sentences
    assert len(expected) == toy_task.SPLIT_SIZES["test"]
    for name in ("split.pt", "merged.pt", "stripped.pt"):
        assert generate(data, forms / name, beam=2).sentences == expected, name


def test_stripped_is_smaller(forms):
    size = (forms / "original.pt").stat().st_size
    assert size / 3.1 < (forms / "stripped.pt").stat().st_size < size / 2.9, "Adam keeps two copies"


# --------------------------------------------------------------------------------------
# averages


def mean_of(paths):
    models = [torch.load(path, weights_only=False)["model"] for path in paths]
    return {name: torch.stack([m[name].double() for m in models]).mean(0) for name in models[0]}


def assert_average(path, paths, tolerance):
    actual = torch.load(path, weights_only=False)
    assert "last_optimizer_state" not in actual
    expected = mean_of(paths)
    assert actual["model"].keys() == expected.keys()
    for name, mean in expected.items():
        close = {"rtol": tolerance, "atol": tolerance / 100, "check_dtype": False}
        torch.testing.assert_close(actual["model"][name].double(), mean, **close, msg=name)
    last = torch.load(paths[-1], weights_only=False)
    assert actual["optimizer_history"] == last["optimizer_history"], "the rest is of the last"
    return actual["model"]


def interval(folder, update):
    return folder / f"checkpoint_1_{update}.pt"


def test_average_is_the_mean_of_the_parameters(saved, data, tmp_path):
    """Of the last ones by their updates: by their names, 5 would be the last."""
    outcome = checkpoint("average", saved, "--last", 2, "--to", tmp_path / "average.pt")
    assert outcome.stderr.splitlines() == [str(interval(saved, n)) for n in (10, 15)]
    assert_average(tmp_path / "average.pt", [interval(saved, n) for n in (10, 15)], 1e-6)
    first, second = mean_of([interval(saved, 10)]), mean_of([interval(saved, 15)])
    assert not any(torch.equal(first[n], second[n]) for n in first if "experts" in n)
    model = torch.load(tmp_path / "average.pt", weights_only=False)["model"]
    shared = [model[f"decoder.{n}.weight"] for n in ("embed_tokens", "output_projection")]
    assert len({tensor.data_ptr() for tensor in shared}) == 1, "written once"
    toy_task.load(data, tmp_path / "average.pt")


def test_average_of_half_precision_and_of_parts(saved, tmp_path, checkpoint_again):
    """Which are the same as in one piece; and sums do not lose what half precision cannot hold."""
    halves = []
    for update in (5, 10, 15):
        state = torch.load(interval(saved, update), weights_only=False)
        for name, tensor in state["model"].items():
            state["model"][name] = tensor.half()
        state["model"]["encoder.layer_norm.weight"].fill_(40000 + 32 * update)
        halves.append(tmp_path / f"half{update}.pt")
        torch.save(state, halves[-1])
    average = tmp_path / "average.pt"
    checkpoint_again("average", *halves, "--to", average)
    model = assert_average(average, halves, 1e-3)
    assert {tensor.dtype for tensor in model.values()} == {torch.float16}
    assert model["encoder.layer_norm.weight"].unique().tolist() == [40320]

    checkpoint_again("split", halves[1], halves[1], "--parts", 2)
    checkpoint_again("average", *halves, "--to", average)  # also in the place of an older one
    again = torch.load(average, weights_only=False)["model"]
    assert again.keys() == model.keys()
    assert all(torch.equal(again[name], model[name]) for name in model)


def test_average_of_ends_of_epochs(saved, tmp_path, checkpoint_again):
    """9 comes before 10, and what lies between epochs is left out."""
    for source, target in (
        ("checkpoint_1_5.pt", "checkpoint10.pt"),
        ("checkpoint_1_10.pt", "checkpoint9.pt"),
        ("checkpoint_1_15.pt", "checkpoint2.pt"),
        ("checkpoint_1_15.pt", "checkpoint_11_100.pt"),
    ):
        shutil.copyfile(saved / source, tmp_path / target)
    average, last = tmp_path / "average.pt", [tmp_path / f"checkpoint{n}.pt" for n in (9, 10)]
    outcome = checkpoint_again("average", tmp_path, "--last", 2, "--epochs", "--to", average)
    assert outcome.stderr.splitlines() == list(map(str, last))
    assert_average(average, last, 1e-6)


def test_checkpoints_of_other_parameters_are_not_averaged(saved, data, tmp_path, checkpoint_again):
    other, average = tmp_path / "other.pt", tmp_path / "average.pt"
    model = toy_task.set_up(data, "--smoe-strata", "4-4")[2]
    torch.save({"model": model.state_dict()}, other)
    outcome = checkpoint_again("average", interval(saved, 5), other, "--to", average, check=False)
    message = refusal(outcome)
    assert f"{other}: holds other parameters" in message
    assert not average.exists()


# --------------------------------------------------------------------------------------
# what others have written


def test_inspect_of_a_dense_model(data, tmp_path, checkpoint_again):
    """In fairseq's older format, and without anything but the model."""
    cfg, _, model, _ = toy_task.set_up(data, *MODELS["dense"])
    options = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    torch.save(
        {"cfg": options, "model": model.half().state_dict()},
        tmp_path / "dense.pt",
        _use_new_zipfile_serialization=False,
    )
    facts = json.loads(checkpoint_again("inspect", tmp_path / "dense.pt", "--json").stdout)
    assert facts == {
        f"{tmp_path}/dense.pt": {
            "architecture": "smoe_transformer_tiny",
            "experts": "no experts",
            "expert blocks": 0,
            "parameters": sum(p.numel() for p in model.parameters()),
            "of experts": 0,
            "parts": 1,
            "type": "float16",
            "updates": None,
            "epoch": None,
            "validation loss": None,
            "best so far": None,
            "optimizer": "none",
        }
    }


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], {"model": "large"}])
def test_a_file_without_a_model_is_named(content, tmp_path, checkpoint_again):
    torch.save(content, tmp_path / "other.pt")
    message = refusal(checkpoint_again("inspect", tmp_path / "other.pt", check=False))
    assert f"{tmp_path}/other.pt: holds no model" in message


# --------------------------------------------------------------------------------------
# mistakes


class Place:
    """Files for a command that fails, the output among them."""

    def __init__(self, folder, forms):
        self.forms, self.output = forms, folder / "output.pt"
        self.output.write_bytes(b"the old one")
        self.folder, self.copy = folder, folder / "copy.pt"

    def whole(self):
        shutil.copyfile(self.forms / "original.pt", self.copy)
        return self.copy

    def split(self):
        shutil.copyfile(self.forms / "split.pt", self.copy)
        experts = parts_of(self.forms / "split.pt")[0].parent
        shutil.copytree(experts, self.folder / experts.name)
        return self.copy


def missing_file(place):
    return ["merge", place.copy, place.output], f"{place.copy}: no such file"


def folder_as_input(place):
    return ["strip", place.forms, place.output], f"{place.forms}: is a folder"


def folder_as_output(place):
    return ["merge", place.whole(), place.folder], f"{place.folder}: is a folder"


def parts_that_do_not_divide(place):
    words = ["split", place.whole(), place.output, "--parts", 3]
    return words, "--parts 3: expected a divisor of the number of experts.* has 8 experts"


def parts_of_other_tools(place):
    state = torch.load(place.whole(), weights_only=False)
    del state["trained_parameters"]
    torch.save(state, place.copy)
    words = ["split", place.copy, place.output, "--parts", 2]
    return words, "--parts 2: .*does not say what the optimizer's state belongs to"


def one_part(place):
    return ["split", place.whole(), place.output, "--parts", 1], "--parts 1: expected"


def folder_without_last(place):
    words = ["average", place.whole(), place.forms, "--to", place.output]
    return words, f"{place.forms}: is a folder.*--last N"


def last_without_folder(place):
    words = ["average", place.whole(), "--last", 2, "--to", place.output]
    return words, f"--last 2: expected one folder of checkpoints, not {place.copy}"


def more_than_there_are(place):
    shutil.copyfile(place.whole(), place.folder / "checkpoint_1_30.pt")
    words = ["average", place.folder, "--last", 2, "--to", place.output]
    return words, f"--last 2: {place.folder} has 1 checkpoints"


def epochs_without_last(place):
    words = ["average", place.whole(), "--epochs", "--to", place.output]
    return words, "--epochs: give it with --last N"


def truncated_file(place):
    content = place.whole().read_bytes()
    place.copy.write_bytes(content[: len(content) * 2 // 3])
    return ["strip", place.copy, place.output], f"{place.copy}: is damaged"


def flipped_byte(place):
    flip(place.whole(), place.copy.stat().st_size // 2)
    return ["strip", place.copy, place.output], f"{place.copy}: is damaged"


def flipped_byte_in_a_part(place):
    part = parts_of(place.split())[2]
    flip(part, part.stat().st_size // 2)
    return ["inspect", place.copy], f"{part}: is damaged"


def missing_part(place):
    part = parts_of(place.split())[1]
    part.unlink()
    words = ["merge", place.copy, place.output]
    return words, f"{place.copy}: its experts are in {part.parent}, where {part.name} is missing"


def part_of_another_checkpoint(place):
    """Of the same model, and the same update."""
    part = parts_of(place.split())[1]
    state = read_checkpoint(place.copy)
    transform.write_in_parts(state, 4, place.folder / "another.pt")
    shutil.copyfile(parts_of(place.folder / "another.pt")[1], part)
    return ["merge", place.copy, place.output], f"{part}: is no part of {place.copy}"


def part_of_another_rank(place):
    first, second, *_ = parts_of(place.split())
    shutil.copyfile(first, second)
    return ["merge", place.copy, place.output], f"{second}: is no part of {place.copy}"


@pytest.mark.parametrize(
    "mistake",
    [
        missing_file,
        folder_as_input,
        folder_as_output,
        parts_that_do_not_divide,
        parts_of_other_tools,
        one_part,
        folder_without_last,
        last_without_folder,
        more_than_there_are,
        epochs_without_last,
        truncated_file,
        flipped_byte,
        flipped_byte_in_a_part,
        missing_part,
        part_of_another_checkpoint,
        part_of_another_rank,
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_a_mistake_is_answered_in_one_line_and_changes_nothing(
    mistake, forms, tmp_path, checkpoint_again
):
    words, message = mistake(Place(tmp_path, forms))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert re.search(message, refusal(checkpoint_again(*words, check=False)))
    assert (tmp_path / "output.pt").read_bytes() == b"the old one"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    source, output = tmp_path / "nowhere.pt", tmp_path / "output.pt"
    command = ("python", "-m", "fairseq_smoe", "checkpoint", "strip", source, output)
    assert f"{source}: no such file" in refusal(run(*command, check=False))
    assert not output.exists()
