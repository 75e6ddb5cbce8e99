"""Sentences that are longer than a training takes are left out of its sets and named."""

import argparse

import pytest
import torch
import toy_task
from fairseq import tasks
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError

LIMIT = 20  # tokens, of which two are the end and the language's


def write(folder, split, lengths):
    """Binarised sentences ``word0 word0 ...`` of a pair en-aa."""
    for lang in ("en", "aa"):
        builder = MMapIndexedDatasetBuilder(f"{folder}/{split}.en-aa.{lang}.bin")
        for length in lengths:
            builder.add_item(torch.tensor([4] * length + [2]))
        builder.finalize(f"{folder}/{split}.en-aa.{lang}.idx")


@pytest.fixture
def folder(tmp_path):
    toy_task.write_dictionaries(tmp_path, ("en", "aa"), 8)
    write(tmp_path, "train", [3, LIMIT + 10, 3, 4] * 4)
    write(tmp_path, "valid", [3, 3, LIMIT, 3])
    return tmp_path


LIMITS = {"max_source_positions": LIMIT, "max_target_positions": LIMIT, "lang_pairs": None}


def test_a_training_names_them_and_goes_on(folder, tmp_path):
    outcome = toy_task.train(folder, tmp_path / "run", **LIMITS, max_update=2)
    assert [record["valid_loss"] > 0 for record in outcome.log("valid")] == [True, True]
    lines = [line for line in outcome.stderr.splitlines() if "left out" in line]
    lines += [line for line in outcome.stdout.splitlines() if "left out" in line]
    assert len(lines) == 2, "each set once, although it is validated and read more often"
    (valid,) = (line for line in lines if "valid: left out 2 of 8 sentences" in line)
    size = f"sentence 2 ({LIMIT + 2} source, {LIMIT + 2} target tokens)"
    assert f"aa-en {size}, en-aa {size}" in valid and "--max-source-positions" in valid
    (trained,) = (line for line in lines if "train: left out 8 of 32 sentences" in line)
    assert "and 3 more" in trained


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Options of a training."""
    folder = tmp_path_factory.mktemp("options")
    toy_task.write_dictionaries(folder, ("en", "aa"), 8)
    write(folder, "train", [1])
    return toy_task.set_up(folder, **LIMITS)[0]


def batches(cfg, folder, split, max_tokens=700):
    """A set, and the indices of the sentences in its batches."""
    args = argparse.Namespace(**{**vars(cfg.task), "data": str(folder)})
    task = tasks.setup_task(args)
    task.load_dataset(split, epoch=1)
    iterator = task.get_batch_iterator(
        task.dataset(split), max_tokens=max_tokens, max_positions=task.max_positions()
    )
    return task.dataset(split), [i for batch in iterator.frozen_batches for i in batch]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 2 * LIMIT), min_size=1, max_size=12))
def test_the_others_are_all_used(cfg, tmp_path_factory, lengths):
    """Wherever the long ones are, and for training and validation alike."""
    folder = tmp_path_factory.mktemp("data")
    toy_task.write_dictionaries(folder, ("en", "aa"), 8)
    for split in ("train", "valid"):
        write(folder, split, [1, *lengths])
        dataset, used = batches(cfg, folder, split)
        sizes = [max(dataset.size(i)) for i in range(len(dataset))]
        assert sorted(used) == [i for i, size in enumerate(sizes) if size <= LIMIT]
        assert len(sizes) == 2 * (len(lengths) + 1)


def test_a_batch_is_a_limit_too(cfg, folder):
    """Of validation too, which fairseq ends with an error."""
    write(folder, "valid", [1, 9, 3])
    _, used = batches(cfg, folder, "valid", max_tokens=8)
    assert sorted(used) == [0, 2, 3, 5]


def test_a_set_of_long_sentences_alone_is_an_error(cfg, folder):
    write(folder, "valid", [LIMIT, 2 * LIMIT])
    with pytest.raises(OptionError, match=f"^valid: all 4 sentences are longer than {LIMIT}"):
        batches(cfg, folder, "valid")
