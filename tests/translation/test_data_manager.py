"""Which files the task reads, in which epoch, and in what proportions it draws from them."""

import gc
import logging
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_task
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import IndexedDatasetBuilder
from toy_task import set_up, write_binarised, write_dictionaries

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.data_manager import count_sentences

LANGS = ("en", "aa", "bb", "cc")
PAIRS = ("en-aa", "bb-en", "en-cc")
DIRECTIONS = ("en-aa", "aa-en", "en-bb", "bb-en", "en-cc", "cc-en")


@pytest.fixture
def folder(tmp_path):
    """Three pairs with the words 0, 1, 2; ``bb`` has no validation files."""
    folder = tmp_path / "data-bin"
    write_dictionaries(folder, LANGS, num_words=8)
    for word, pair in enumerate(PAIRS):
        write_binarised(folder, "train", pair, 10 * (word + 1), word)
        if pair != "bb-en":
            write_binarised(folder, "valid", pair, 6, word)
    return folder


def task_of(folder, *more, directions=DIRECTIONS, **options):
    return set_up(folder, *more, lang_pairs=",".join(directions), **options)[1]


def load_training_set(task, epoch=1):
    """The training set as ``fairseq-train`` loads it, by direction."""
    task.load_dataset("train", epoch=epoch, combine=True)
    dataset = task.datasets["train"]
    return dict(zip((key.removeprefix("main:") for key in dataset.keys), dataset.datasets))


# --------------------------------------------------------------------------------------
# files


def test_a_file_is_opened_once_and_read_with_the_language_token_of_each_direction(
    folder, monkeypatch
):
    opened = Counter()
    stock = data_utils.load_indexed_dataset

    def load_indexed_dataset(path, *args):
        opened[path] += 1
        return stock(path, *args)

    monkeypatch.setattr(data_utils, "load_indexed_dataset", load_indexed_dataset)
    task = task_of(folder)
    for direction, dataset in load_training_set(task).items():
        target = direction.split("-")[1]
        word = DIRECTIONS.index(direction) // 2
        token = task.source_dictionary.index(f"__{target}__")
        assert dataset[0]["source"].tolist() == [token, 4 + word, 2]
        assert dataset[0]["target"].tolist() == [token, 4 + word, 2]
        assert dataset[2]["source"].tolist() == [token, *[4 + word] * 3, 2]
    assert len(opened) == 2 * len(PAIRS) and set(opened.values()) == {1}


def test_files_of_a_dropped_training_set_are_closed(folder):
    task = task_of(folder)
    datasets = load_training_set(task)
    assert len(task.data_manager._open_files) == 2 * len(PAIRS)
    del task.datasets["train"], datasets
    gc.collect()
    assert not task.data_manager._open_files


def test_equal_dictionaries_are_read_once_and_others_are_not_taken_for_equal(folder):
    task = task_of(folder)
    assert len({id(dictionary) for dictionary in task.dicts.values()}) == 1
    assert task.source_dictionary.count[task.source_dictionary.index("word0")] == 1
    (folder / "dict.cc.txt").write_text("another 1\n")
    with pytest.raises(AssertionError, match="Diffrent dictionary"):
        task_of(folder)


def test_a_missing_dictionary_is_named_in_one_line(folder):
    (folder / "dict.bb.txt").unlink()
    with pytest.raises(OptionError, match=r"dict\.bb\.txt: no such dictionary"):
        task_of(folder)


def test_directions_without_validation_files_are_left_out_and_named(folder, caplog):
    task = task_of(folder)
    with caplog.at_level(logging.INFO, logger="fairseq_smoe"):
        task.load_dataset("valid")
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("fairseq_smoe")]
    assert "[valid]" in line and "en-bb, bb-en" in line and "aa" not in line and "cc" not in line
    dataset = task.datasets["valid"]
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])
    named = [DIRECTIONS[i] for i in batch["direction"]]
    assert Counter(named) == {d: 6 for d in DIRECTIONS if "bb" not in d}
    for direction, target in zip(named, batch["target"]):
        assert target[0] == task.source_dictionary.index(f"__{direction.split('-')[1]}__")
        assert target[1] == 4 + DIRECTIONS.index(direction) // 2


def test_all_directions_are_trained_unless_told_otherwise(folder):
    task = set_up(folder, lang_pairs=None)[1]
    assert task.lang_pairs == sorted(DIRECTIONS)
    load_training_set(task)
    assert len(task.datasets["train"]) == 2 * (10 + 20 + 30)
    for path in folder.glob("train.*"):
        path.unlink()
    with pytest.raises(OptionError, match="holds no training files; give the output of prepare"):
        set_up(folder, lang_pairs=None)


def test_half_a_pair_counts_as_missing(folder):
    (folder / "valid.en-cc.cc.bin").unlink()
    task = task_of(folder)
    task.load_dataset("valid")
    assert len(task.datasets["valid"]) == 2 * 6


def test_files_without_sentences_count_as_missing(folder):
    """fairseq-preprocess makes them of empty text; opening one fails."""
    write_binarised(folder, "valid", "en-cc", 0)
    task = task_of(folder)
    task.load_dataset("valid")
    assert len(task.datasets["valid"]) == 2 * 6


def test_no_validation_files_at_all_is_answered_in_one_line(folder):
    task = task_of(folder, directions=("en-bb", "bb-en"))
    with pytest.raises(OptionError) as refusal:
        task.load_dataset("valid")
    for part in ("--valid-subset valid", str(folder), "en-aa, en-cc", "--disable-validation"):
        assert part in str(refusal.value)


def test_a_training_direction_without_files_is_answered_in_one_line(folder):
    task = task_of(folder, directions=("en-aa", "aa-bb"))
    with pytest.raises(OptionError) as refusal:
        task.load_dataset("train")
    for part in ("--lang-pairs aa-bb", str(folder), "bb-en, en-aa, en-cc"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_translating_a_direction_without_files_is_answered_in_one_line(data, short_run):
    outcome = toy_task.generate(data, short_run / "checkpoint_last.pt", "aa-bb", check=False)
    assert outcome.returncode != 0 and "Traceback" not in outcome.stderr
    line = outcome.stderr.splitlines()[-1]
    assert line.startswith("error: --source-lang aa --target-lang bb: ") and "--gen-subset" in line


# --------------------------------------------------------------------------------------
# shards

SHARD_SIZES = {"en-aa": (50, 50, 5), "bb-en": (40, 20), "en-cc": (30,)}


def write_shards(folder, sizes=SHARD_SIZES):
    """Shard i of every pair says the word i."""
    write_dictionaries(folder, LANGS, num_words=8)
    for pair, counts in sizes.items():
        write_binarised(folder, "valid", pair, 6)
        for i, count in enumerate(counts):
            write_binarised(folder / f"shard{i:03d}", "train", pair, count, i)
    return folder


def words_of(task, epoch):
    """``{direction: (number of sentences, the word they say)}``"""
    return {
        direction: (len(dataset), int(dataset[0]["source"][1]) - 4)
        for direction, dataset in load_training_set(task, epoch).items()
    }


def test_every_epoch_reads_the_next_shard_of_each_direction(tmp_path):
    task = task_of(write_shards(tmp_path / "data-bin"))
    task.load_dataset("valid")
    assert len(task.datasets["valid"]) == 6 * len(DIRECTIONS)
    for epoch in range(1, 8):
        found = words_of(task, epoch)
        assert task.has_sharded_data("train")
        for pair, sizes in SHARD_SIZES.items():
            shard = (epoch - 1) % len(sizes)
            for direction in (pair, "-".join(reversed(pair.split("-")))):
                assert found[direction] == (sizes[shard], shard), (epoch, direction)


def test_a_training_right_away_in_a_later_epoch_reads_the_same_shard(tmp_path):
    """As when resumed."""
    folder = write_shards(tmp_path / "data-bin")
    assert words_of(task_of(folder), 3)["en-aa"] == (5, 2)


def test_shards_given_by_colons_need_not_hold_a_pair_from_the_first_on(tmp_path):
    """fairseq's own way: the dictionaries and validation files lie in the first folder."""
    folders = [tmp_path / name for name in "abc"]
    write_dictionaries(folders[0], LANGS, num_words=8)
    write_binarised(folders[0], "valid", "en-aa", 6)
    for i, folder in enumerate(folders):
        write_binarised(folder, "train", "en-cc", 10, i)
        if folder.name != "b":
            write_binarised(folder, "train", "en-aa", 20, i)
    task = task_of(":".join(map(str, folders)), directions=("en-aa", "en-cc"))
    task.load_dataset("valid")
    assert len(task.datasets["valid"]) == 6
    assert words_of(task, 1) == {"en-aa": (20, 0), "en-cc": (10, 0)}
    assert words_of(task, 2) == {"en-aa": (20, 2), "en-cc": (10, 1)}
    assert words_of(task, 3) == {"en-aa": (20, 0), "en-cc": (10, 2)}


def test_sampling_knows_the_sizes_of_shards_not_read_yet(tmp_path):
    """fairseq would take each shard to be as large as the first: 150, 80 and 30."""
    task = task_of(write_shards(tmp_path / "data-bin"), sampling_temperature=2)
    for epoch in (1, 2, 3):
        task.load_dataset("train", epoch=epoch, combine=True)
        ratios = task.datasets["train"].sample_ratios
        expected = np.sqrt([105, 105, 60, 60, 30, 30])
        np.testing.assert_allclose(ratios / ratios.sum(), expected / expected.sum())


def test_files_train1_and_so_on_count_as_the_shard_they_lie_in(tmp_path):
    folder = write_shards(tmp_path / "data-bin")
    write_binarised(folder / "shard001", "train1", "bb-en", 15, 1)
    task = task_of(folder)
    task.load_dataset("train", epoch=1, combine=True)
    ratios = task.datasets["train"].sample_ratios
    np.testing.assert_allclose(ratios[2] / ratios[0], 75 / 105)


def test_sentences_are_counted_in_every_format(tmp_path):
    write_binarised(tmp_path, "train", "en-aa", 7)
    assert count_sentences(str(tmp_path / "train.en-aa.en")) == 7
    builder = IndexedDatasetBuilder(tmp_path / "old.bin")
    for _ in range(3):
        builder.add_item(torch.tensor([4, 2]))
    builder.finalize(tmp_path / "old.idx")
    assert count_sentences(str(tmp_path / "old")) == 3


def test_a_training_stopped_in_a_shard_goes_on_in_it(tmp_path):
    """Updates of all epochs are those of an uninterrupted training."""
    folder = write_shards(tmp_path / "data-bin")

    def run(save_dir, **more):
        options = {"max_tokens": 160, "max_epoch": 3, "log_interval": 1, **more}
        outcome = toy_task.train(
            folder, tmp_path / save_dir, lang_pairs=",".join(DIRECTIONS), **options
        )
        return {r["num_updates"]: (r["epoch"], r["loss"]) for r in outcome.log("train_inner")}

    whole = run("whole")
    epochs = Counter(epoch for epoch, _ in whole.values())
    assert len(epochs) == 3
    stop = int(epochs[1] + epochs[2] // 2)
    first, second = run("parts", max_update=stop), run("parts")
    assert max(first) == stop and min(second) == stop + 1
    assert {**first, **second} == whole


# --------------------------------------------------------------------------------------
# sampling


def sampled(folder, sizes, temperature):
    """``(task, directions, counts)``: how often each direction is in the training set of a folder,
    after checking that against the definition. ``sizes`` gives the sentences of every pair."""
    directions = [d for pair in sizes for d in (pair, "-".join(reversed(pair.split("-"))))]
    task = task_of(folder, directions=directions, sampling_temperature=temperature)
    load_training_set(task)
    dataset = task.datasets["train"]
    size_of_direction = np.repeat(list(sizes.values()), 2)
    assert abs(len(dataset) - virtual_size(size_of_direction, temperature)) <= 1
    expected = shares(size_of_direction, temperature) * len(dataset)
    counts = dataset.virtual_size_per_dataset
    assert counts.sum() == len(dataset)
    # fairseq rounds down, then gives the fewer than len(directions) sentences still wanting to
    # directions drawn at random, some of which get several
    assert (counts >= np.floor(expected - 1e-6)).all()
    assert (counts - expected).max() < 5
    return task, directions, counts


def iterate(task):
    return task.get_batch_iterator(
        task.datasets["train"],
        max_tokens=8000,
        max_positions=task.max_positions(),
        required_batch_size_multiple=8,
    )


def shares(sizes, temperature):
    """p_l = (n_l / N)^(1/T) / sum"""
    powers = (sizes / sizes.sum()) ** (1 / temperature)
    return powers / powers.sum()


def virtual_size(sizes, temperature):
    """fairseq's: the largest direction is drawn once, but all together at most one and a half
    times the data; shares stay."""
    return min(sizes.max() / shares(sizes, temperature).max(), 1.5 * sizes.sum())


@pytest.mark.parametrize("temperature", [1, 5])
def test_directions_are_sampled_by_their_definition(temperature, tmp_path):
    sizes = {"en-aa": 3000, "bb-en": 700, "en-cc": 26}
    write_dictionaries(tmp_path, LANGS, num_words=8)
    for word, (pair, size) in enumerate(sizes.items()):
        write_binarised(tmp_path, "train", pair, size, word)
    task, directions, counts = sampled(tmp_path, sizes, temperature)
    drawn = Counter()
    for batch in iterate(task).next_epoch_itr(shuffle=True):
        drawn.update(map(tuple, batch["target"][:, :2].tolist()))
    for i, direction in enumerate(directions):
        token = task.source_dictionary.index(f"__{direction.split('-')[1]}__")
        assert drawn[token, 4 + i // 2] == counts[i], direction


@pytest.mark.parametrize("temperature", [1, 1.5, 5])
def test_sentences_of_a_direction_come_equally_often(temperature, tmp_path):
    sizes = {"en-aa": 3000, "bb-en": 700, "en-cc": 26}
    write_dictionaries(tmp_path, LANGS, num_words=8)
    for pair, size in sizes.items():
        write_binarised(tmp_path, "train", pair, size)
    task = task_of(tmp_path, sampling_temperature=temperature)
    load_training_set(task)
    dataset = task.datasets["train"]
    most = []
    for drawn, part in zip(
        np.split(dataset._cur_indices, dataset.cumulated_sizes[:-1]), dataset.datasets
    ):
        counts = np.bincount(drawn, minlength=len(part))
        assert counts.max() - counts.min() <= 1
        most.append(counts.max())
    assert most == [1] * 6 if temperature == 1 else max(most) > 2


ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "data" / "opus-gettext.tar.xz"


@pytest.fixture(scope="module")
def opus(make_once):
    """``(folder, {pair: sentences})``, as large as 98 real pairs."""
    if not ARCHIVE.exists():
        pytest.skip(f"no text of 98 pairs at {ARCHIVE}")
    sizes = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            match = re.fullmatch(r"opus\.(\w+-\w+)-train\.en", Path(member.name).name)
            if match:
                sizes[match[1]] = archive.extractfile(member).read().count(b"\n")
    assert len(sizes) == 98

    def make(folder):
        langs = sorted({lang for pair in sizes for lang in pair.split("-")})
        write_dictionaries(folder, langs, num_words=104)
        for word, (pair, size) in enumerate(sizes.items()):
            write_binarised(folder, "train", pair, size, word)

    return make_once("opus", make), sizes


@pytest.mark.parametrize("temperature", [1, 5])
def test_98_pairs_are_sampled_by_the_definition(temperature, opus):
    task, _, counts = sampled(*opus, temperature)
    batches = iterate(task).frozen_batches
    batched = np.searchsorted(
        task.datasets["train"].cumulated_sizes, np.concatenate(batches), side="right"
    )
    assert len(batches) > 100 and (np.bincount(batched) == counts).all()
