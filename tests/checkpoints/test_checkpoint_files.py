"""Files of checkpoints: written whole or not at all, damage found, nothing in them run; and experts
in parts, as units."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_task import REPOSITORY, environment, run

from fairseq_smoe import files as whole_files
from fairseq_smoe.checkpoints import choice, files, parts, transform
from fairseq_smoe.checkpoints.parts import Parted, read_checkpoint
from fairseq_smoe.errors import CheckpointError, OptionError

CONTENT = {
    "model": {"a": torch.arange(40.0), "b": torch.arange(5).half()},
    "cfg": Namespace(arch="smoe_transformer", lr=[0.1]),
    "best": np.float64(2.5),
    "counts": [np.int64(3), np.float32(4), np.bool_(True)],
    "totals": np.array([1.0, 2.0]),
}


def same(content, other=CONTENT):
    if isinstance(content, dict):
        return content.keys() == other.keys() and all(same(content[n], other[n]) for n in content)
    if isinstance(content, torch.Tensor):
        return content.dtype == other.dtype and torch.equal(content, other)
    if isinstance(content, np.ndarray):
        return np.array_equal(content, other)
    return content == other


def replace(path, content):
    """New bytes in a new file: what has been read of the old one may still be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def refused(path, read=files.read):
    """The message of a file that is refused, in one line that names it."""
    with pytest.raises(CheckpointError) as refusal:
        read(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# --------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_every_format_are_read(new_format, tmp_path):
    torch.save(CONTENT, tmp_path / "file.pt", _use_new_zipfile_serialization=new_format)
    assert same(files.read(tmp_path / "file.pt"))


def test_numbers_of_numpy_1_are_read(tmp_path):
    """They name another module."""
    file = io.BytesIO()
    torch.save(CONTENT, file, _use_new_zipfile_serialization=False)
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert file.getvalue().count(new) >= 2
    (tmp_path / "file.pt").write_bytes(file.getvalue().replace(new, old))
    assert same(files.read(tmp_path / "file.pt"))


def test_tensors_that_share_memory_do_so_afterwards(tmp_path):
    shared = torch.ones(100_000)
    files.write({"model": {"one": shared, "other": shared}}, tmp_path / "file.pt")
    files.write(files.read(tmp_path / "file.pt"), tmp_path / "again.pt")
    assert (tmp_path / "again.pt").stat().st_size < 500_000
    model = files.read(tmp_path / "again.pt")["model"]
    assert model["one"].data_ptr() == model["other"].data_ptr()


# --------------------------------------------------------------------------------------
# damage


def test_a_damaged_byte_is_found_wherever_it_is(tmp_path):
    """Or it is one that means nothing, such as a date. Every byte of a file, one bit of each."""
    path = tmp_path / "file.pt"
    files.write(CONTENT, path)
    whole, found = path.read_bytes(), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        replace(path, damaged)
        try:
            assert same(files.read(path)), position
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            found += 1
    assert found > len(whole) / 2


@pytest.mark.parametrize("checked", [True, False])
def test_a_file_that_is_marked_as_a_folder_is_found(checked, tmp_path):
    """Of which torch reads nothing, and takes what happens to be in memory for its content."""
    path = tmp_path / "file.pt"
    files.write(CONTENT, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\1\2") + 38] |= 0x10  # attributes of the first entry, the pickle
    replace(path, damaged)
    assert "data.pkl" in refused(path, lambda path: files.read(path, checked))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damage_of_any_kind_is_found(drawn):
    file = io.BytesIO()
    torch.save(CONTENT, file)
    damaged = bytearray(file.getvalue())
    for _ in range(drawn.draw(st.integers(1, 4))):
        damaged[drawn.draw(st.integers(0, len(damaged) - 1))] = drawn.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        path.write_bytes(damaged)
        try:
            assert same(files.read(path))
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 100, 0.5, 0.9, -22, -1])
def test_a_truncated_file_is_found(kept, tmp_path):
    path = tmp_path / "file.pt"
    files.write(CONTENT, path)
    whole = path.read_bytes()
    kept = int(kept * len(whole)) if isinstance(kept, float) else kept % len(whole)
    replace(path, whole[:kept])
    assert "is damaged, or no checkpoint" in refused(path)
    assert "is damaged, or no checkpoint" in refused(path, files.check)


@pytest.mark.parametrize("content", [b"text\n", b"\x80", b"\x80\x02", b"PK\x03\x04" * 20])
def test_a_file_of_another_kind_is_named(content, tmp_path):
    (tmp_path / "file.pt").write_bytes(content)
    assert "is damaged, or no checkpoint" in refused(tmp_path / "file.pt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "file.pt").endswith("no such file")
    assert refused(tmp_path).endswith("is a folder, not a file")


# --------------------------------------------------------------------------------------
# what is in it


class Order:
    """Makes a folder when it is unpickled by a loader that does what it is told."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_order(path, folder, bare):
    """A checkpoint that looks like one, and has an order in it."""
    content = {"model": {"weight": torch.ones(2)}, "extra_state": Order(folder)}
    if bare:
        path.write_bytes(pickle.dumps(Order(folder), protocol=2))
    else:
        torch.save(content, path)


@pytest.fixture
def obeyed(tmp_path):
    """The folder that shows it."""
    folder = tmp_path / "obeyed"
    yield folder
    assert not folder.exists()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("variable", ["0", "1"])
def test_what_is_in_a_file_is_not_run(bare, variable, obeyed, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    write_order(path, obeyed, bare)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", variable)
    for read in (files.read, read_checkpoint):
        message = refused(path, read)
        assert "asks for posix.mkdir, which is no plain data; it was not loaded" in message
    # else this would show nothing
    (pickle.loads(path.read_bytes()) if bare else torch.load(path, weights_only=False))
    assert obeyed.is_dir()
    obeyed.rmdir()


def test_what_is_in_a_part_is_not_run(obeyed, tmp_path):
    transform.write_in_parts(state_of(4, 2), 2, tmp_path / "checkpoint.pt")
    (part,) = tmp_path.glob("experts-*/part-1-of-2.pt")
    write_order(part, obeyed, bare=False)
    with pytest.raises(CheckpointError, match=f"{part}: asks for posix.mkdir"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def translate(path, data):
    return ["fairseq-generate", data, *toy_task._translation_options(path, "en-aa", (), {})]


def go_on(path, data):
    return toy_task.train_command(data, path.parent / "run", restore_file=path, max_update=1)


def evaluate(path, data):
    return [
        *("python", "-m", "fairseq_smoe", "evaluate", "--run", path.parent, "--checkpoint", path),
        *("--data", data, "--cpu", "--no-score"),
    ]


def inspect(path, data):
    return ["python", "-m", "fairseq_smoe", "checkpoint", "inspect", path]


@pytest.mark.parametrize(
    "command, bare",
    [(translate, False), (go_on, False), (evaluate, False), (inspect, False), (translate, True)],
)
def test_no_command_runs_what_is_in_a_checkpoint(
    command, bare, obeyed, data, tmp_path, monkeypatch
):
    """Not even where torch is told to trust every file."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "checkpoint.pt"
    write_order(path, obeyed, bare)
    outcome = run(*command(path, data), check=False)
    assert outcome.returncode != 0
    assert "Traceback" not in outcome.stdout + outcome.stderr, outcome.tail()
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {path}: asks for posix.mkdir"), (
        outcome.tail()
    )


# --------------------------------------------------------------------------------------
# interrupted, and without space

WRITE_AND_WRITE = """
import sys, torch
from fairseq_smoe.checkpoints import files
content = {"model": {str(i): torch.ones(5_000_000) for i in range(10)}}  # 200 MB
print("begin", flush=True)
while True:
    files.write(content, sys.argv[1])
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "checkpoint[1].pt"
    files.write(CONTENT, path)
    command = [sys.executable, "-c", WRITE_AND_WRITE, str(path)]
    writer = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE)
    writer.stdout.readline()
    unfinished = whole_files.unfinished(path, writer.pid)
    deadline = time.monotonic() + 60
    while not in_the_middle(unfinished):
        # nothing changes any more between the look at the file and the end
        writer.send_signal(signal.SIGCONT)
        time.sleep(0.01)
        writer.send_signal(signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        assert writer.poll() is None and time.monotonic() < deadline
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert in_the_middle(unfinished) and not files.is_of_torch(unfinished)
    left = files.read(path)
    assert same(left) or all(tensor.min() == 1 for tensor in left["model"].values())
    files.write({**CONTENT, "best": 1}, path)
    assert files.read(path)["best"] == 1
    assert os.listdir(tmp_path) == [path.name], "nothing is left of what was not finished"


def in_the_middle(unfinished):
    return unfinished.exists() and 20e6 < unfinished.stat().st_size < 190e6


FILL = """
import json, os, sys, torch
from fairseq_smoe.checkpoints import files
from fairseq_smoe.errors import DiskFullError
path = os.path.join(sys.argv[1], "checkpoint.pt")
files.write("old", path)
# where torch notices it: at a tensor, at one of many small ones, at the pickle, only at the end
for content in (
    torch.zeros(3_000_000),
    [torch.zeros(1000) for _ in range(300)],
    list(range(400_000)),
    torch.zeros((2**20 - 4096 - 500) // 4),
):
    try:
        files.write(content, path)
        outcome = "written"
    except DiskFullError as error:
        outcome = str(error)
    except Exception as error:
        outcome = repr(error)
    print(json.dumps([outcome, files.read(path) == "old", os.listdir(sys.argv[1])]))
"""


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(command)`` runs a line of bash in which $DISK is a folder on a disk of 1 MB."""

    def run_there(command):
        disk = tmp_path / "disk"
        disk.mkdir()
        script = f"mount -t tmpfs -o size=1m none {disk} || exit 77; DISK={disk}; {command}"
        outcome = run("unshare", "-m", "bash", "-c", script, check=False)
        if outcome.returncode == 77 or "unshare failed" in outcome.stderr:
            pytest.skip("mounting a small disk is not permitted here")
        return outcome

    return run_there


def test_a_full_disk_keeps_the_old_file_and_is_named(small_disk, tmp_path):
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    outcome = small_disk(f"PYTHONPATH={REPOSITORY} python {script} $DISK")
    results = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert len(results) == 4, outcome.tail()
    message = f"{tmp_path}/disk/checkpoint.pt: the disk is full"
    for content, (outcome, is_old, left) in enumerate(results):
        assert outcome.startswith(message), (content, outcome)
        assert is_old and left == ["checkpoint.pt"], content


def test_the_command_keeps_the_old_file_on_a_full_disk(small_disk, tmp_path):
    """Also where a part has been written already."""
    source = tmp_path / "source.pt"
    state = state_of(2, 1)
    state["model"]["weight"] = torch.zeros(400_000)  # too large, beside parts that are not
    files.write(state, source)
    command = f"python -m fairseq_smoe checkpoint split {source} $DISK/checkpoint.pt --parts 2"
    outcome = small_disk(f"echo old >$DISK/checkpoint.pt; {command}; cat $DISK/*; ls $DISK")
    assert outcome.stdout.splitlines() == ["old", "checkpoint.pt"], outcome.tail()
    assert re.fullmatch(
        rf"error: {tmp_path}/disk/checkpoint.pt: the disk is full; [^\n]*\n", outcome.stderr
    ), outcome.tail()


# --------------------------------------------------------------------------------------
# parts

FC1 = "encoder.layers.1.expert_block.experts.fc1_weight"
CMR = "decoder.layers.1.expert_block.block.experts.fc2_bias"


def state_of(num_experts, width, updates=3):
    """A checkpoint of a small model: two parameters of experts among others, all numbers different.

    The third parameter of the optimizer has as many entries as there are experts, but is of none.
    """
    numbers = iter(range(1, 10_000_000, 1000))

    def tensor(*shape):
        return torch.arange(np.prod(shape, dtype=int)).view(shape).float() + next(numbers)

    names = ["weight", FC1, "gate", CMR]
    shapes = [(3, 2), (num_experts, width, 2), (num_experts,), (num_experts, width)]
    return {
        "model": {name: tensor(*shape) for name, shape in zip(names, shapes)},
        "last_optimizer_state": {
            "state": {
                number: {"step": 7, "exp_avg": tensor(*shape), "scale": tensor()}
                for number, shape in enumerate(shapes)
            },
            "param_groups": [{"params": [0, 1, 2, 3]}],
        },
        "trained_parameters": names,
        "optimizer_history": [{"num_updates": updates}],
    }


sizes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))  # E / R, R, width
bounds = st.none() | st.integers(-25, 25)


@given(sizes, bounds, bounds, st.none() | st.integers(1, 6))
@settings(deadline=None)
def test_parted_is_like_the_tensor(sizes, start, stop, step):
    share, size, width = sizes
    tensor = torch.randn(share * size, width, 2)
    used = []
    checks = [partial(used.append, r) for r in range(size)]
    parted = Parted([tensor[r::size] for r in range(size)], checks)
    assert parted.shape == tensor.shape and len(parted) == len(tensor)
    assert torch.equal(parted[:], tensor) and len(used) == len(tensor)
    used.clear()
    assert torch.equal(parted[start:stop:step], tensor[start:stop:step])
    assert used == [e % size for e in range(len(tensor))[start:stop:step]]
    assert all(torch.equal(parted.entry(e), tensor[e]) for e in range(len(tensor)))
    parted[:].zero_()
    assert torch.equal(parted[:], tensor), "what is taken out is a copy"


@given(sizes.filter(lambda sizes: sizes[1] > 1))
@settings(max_examples=30, deadline=None)
def test_parts_are_put_together_again(sizes):
    share, size, width = sizes
    num_experts = share * size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        transform.write_in_parts(state_of(num_experts, width), size, path)
        written = files.read(path)
        assert set(written["model"]) == {"weight", "gate"}
        moments = written["last_optimizer_state"]["state"]
        assert [sorted(moments[n]) for n in range(4)] == 2 * [
            ["exp_avg", "scale", "step"],
            ["scale", "step"],
        ]
        state = read_checkpoint(path)
        expected = state_of(num_experts, width)
        assert isinstance(state["model"][FC1], Parted)
        assert same(parts.whole(state), expected)


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_taking_experts_out_leaves_the_rest(sizes):
    share, size, width = sizes
    state, expected = (state_of(share * size, width) for _ in range(2))
    taken = parts.take_experts(state)
    assert set(taken["model"]) == {FC1, CMR} and set(taken["optimizer"]) == {1, 3}
    assert all(set(entries) == {"exp_avg"} for entries in taken["optimizer"].values())
    state["model"] |= taken["model"]
    for number, entries in taken["optimizer"].items():
        state["last_optimizer_state"]["state"][number] |= entries
    assert same(state, expected)


def test_a_checkpoint_without_optimizer_is_parted(tmp_path):
    state = transform.stripped(state_of(4, 2))
    transform.write_in_parts(state, 2, tmp_path / "checkpoint.pt")
    expected = transform.stripped(state_of(4, 2))
    assert same(parts.whole(read_checkpoint(tmp_path / "checkpoint.pt")), expected)


def test_parts_are_found_from_a_symbolic_link(tmp_path):
    transform.write_in_parts(state_of(4, 2), 2, tmp_path / "checkpoint.pt")
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "best.pt"
    link.symlink_to("../checkpoint.pt")
    assert same(parts.whole(read_checkpoint(link)), state_of(4, 2))


def test_parts_of_another_model_are_found_out(tmp_path):
    """Also those without a note of their place."""
    for name, width in (("one.pt", 2), ("other.pt", 3)):
        transform.write_in_parts(state_of(4, width), 2, tmp_path / name)
    reference, other = (files.read(tmp_path / n)[parts.REFERENCE] for n in ("one.pt", "other.pt"))
    paths = [tmp_path / r["folder"] / "part-1-of-2.pt" for r in (reference, other)]
    for path in tmp_path.glob("experts-*/*"):
        content = files.read(path)
        assert content.pop("place") == [path.parent.name, path.name]
        files.write(content, path)
    assert same(parts.whole(read_checkpoint(tmp_path / "one.pt")), state_of(4, 2))
    shutil.copyfile(paths[1], paths[0])
    with pytest.raises(CheckpointError, match=f"{paths[0]}: is no part of {tmp_path}/one.pt"):
        read_checkpoint(tmp_path / "one.pt")


def test_a_damaged_part_is_found_where_it_is_used(tmp_path):
    """A rank of two uses one of two parts, and reads no more than that one."""
    path = tmp_path / "checkpoint.pt"
    transform.write_in_parts(state_of(4, 2), 2, path)
    (part,) = tmp_path.glob("experts-*/part-1-of-2.pt")
    content = part.read_bytes()
    values = state_of(4, 2)["model"][FC1][1].numpy().tobytes()
    assert content.count(values) == 1
    replace(part, content.replace(values, bytes(len(values))))
    assert "is damaged" in refused(part, lambda _: read_checkpoint(path))
    fc1 = read_checkpoint(path, checked=False)["model"][FC1]
    assert torch.equal(fc1[::2], state_of(4, 2)["model"][FC1][::2])
    assert "is damaged" in refused(part, lambda _: fc1[1::2])


@pytest.mark.parametrize("num_parts", [-2, 0, 1, 3, 8])
def test_experts_cannot_be_in_any_number_of_parts(num_parts, tmp_path):
    with pytest.raises(OptionError, match=f"--parts {num_parts}: expected .* has 4 experts"):
        transform.write_in_parts(state_of(4, 2), num_parts, tmp_path / "checkpoint.pt")
    assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------
# folders that nothing needs


@pytest.fixture
def two(tmp_path):
    """A folder with ``a.pt`` and ``b.pt``, in parts, and the names of the folders of these."""
    for name in ("a.pt", "b.pt"):
        transform.write_in_parts(state_of(4, 2), 2, tmp_path / name)
    folders = [files.read(tmp_path / name)[parts.REFERENCE]["folder"] for name in ("a.pt", "b.pt")]
    return tmp_path, folders


def remaining(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_folders_that_no_file_names_are_removed(two):
    """A file counts whatever its name; others do not, nor do folders of other names."""
    folder, (first, second) = two
    (folder / "a.pt").rename(folder / "keep this.model")
    files.write({"model": {}}, folder / "whole.pt")
    (folder / "train.log").write_text("text")
    (folder / "empty").write_bytes(b"")
    np.savez(folder / "numbers.npz", a=np.ones(3))  # as torch's, an archive
    torch.save([torch.ones(2)], folder / "list.pt")
    (folder / "experts-of-mine").mkdir()
    parts.remove_unused_folders(folder)
    assert remaining(folder) == {first, second, "experts-of-mine"}
    (folder / "b.pt").unlink()
    parts.remove_unused_folders(folder, {first})
    assert remaining(folder) == {first, second, "experts-of-mine"}, "only those that are named"
    parts.remove_unused_folders(folder)
    assert remaining(folder) == {first, "experts-of-mine"}
    assert same(parts.whole(read_checkpoint(folder / "keep this.model")), state_of(4, 2))


def test_what_a_killed_process_has_left_keeps_nothing(two):
    folder, (first, _) = two
    content = (folder / "b.pt").read_bytes()
    (folder / "b.pt").unlink()
    (folder / "b.pt.unfinished-17").write_bytes(content[: len(content) // 2])
    parts.remove_unused_folders(folder)
    assert remaining(folder) == {first}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "order"])
def test_where_a_file_cannot_be_read_all_folders_are_kept(damage, two, caplog):
    folder, folders = two
    content = bytearray((folder / "a.pt").read_bytes())
    if damage == "truncated":
        replace(folder / "a.pt", content[: len(content) // 2])
    elif damage == "flipped":  # in the name of its folder
        content[content.index(folders[0].encode()) + len("experts-3-")] ^= 1
        replace(folder / "a.pt", content)
    else:
        write_order(folder / "a.pt", folder / "obeyed", bare=False)
    (folder / "b.pt").unlink()
    parts.remove_unused_folders(folder)
    assert remaining(folder) == set(folders)
    assert f"kept, as {folder}/a.pt may need it" in caplog.text


# --------------------------------------------------------------------------------------
# which to go on from


def test_the_newest_whole_checkpoint_is_chosen(tmp_path):
    """Those that are to translate with are no training to go on with, however new."""
    last = tmp_path / "checkpoint_last.pt"
    assert choice.newest_whole(last) == str(last), "nothing is there yet"
    for name, updates in (("_1_9", 9), ("_1_10", 10), ("_last", 20)):
        transform.write_in_parts(state_of(4, 2, updates), 2, tmp_path / f"checkpoint{name}.pt")
    averaged = transform.averaged([last])
    files.write(averaged, tmp_path / "checkpoint_average.pt")
    files.write([1], tmp_path / "checkpoint_of_others.pt")
    assert choice.newest_whole(last) == str(last)
    next(tmp_path.glob("experts-20-*/part-1-of-2.pt")).unlink()
    assert choice.newest_whole(last) == f"{tmp_path}/checkpoint_1_10.pt"
    for path in tmp_path.glob("experts-*/part-0-of-2.pt"):
        replace(path, path.read_bytes()[:-1])
    assert choice.newest_whole(last) == f"{tmp_path}/checkpoint_average.pt"
    replace(tmp_path / "checkpoint_average.pt", b"PK")
    with pytest.raises(CheckpointError, match=f"neither {last} nor another"):
        choice.newest_whole(last)
