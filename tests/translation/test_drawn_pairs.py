"""The training set is fairseq's, in less memory: the same pairs, order and batches."""

import json
import subprocess
import sys

import numpy as np
import pytest
import toy_task
from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager
from fairseq.data.multilingual.sampled_multi_dataset import SampledMultiDataset
from toy_task import set_up, write_dictionaries

from fairseq_smoe.preparation.binary import write_index
from fairseq_smoe.translation import drawn_pairs
from fairseq_smoe.translation.drawn_pairs import draw_evenly, stable_order

SIZES = {"en-aa": (2500, 900), "bb-en": (311,), "en-cc": (26, 40)}
DIRECTIONS = ("en-aa", "aa-en", "en-bb", "bb-en", "en-cc", "cc-en")
LONGEST = 300  # sizes do not fit into a byte


def write_corpus(folder):
    """Shards with sentences of 2 to LONGEST tokens, many of few."""
    rng = np.random.default_rng(1)
    write_dictionaries(folder, ("en", "aa", "bb", "cc"), num_words=8)
    for pair, counts in SIZES.items():
        for i, count in enumerate(counts):
            shard = folder / f"shard{i:03d}"
            shard.mkdir(exist_ok=True)
            for lang in pair.split("-"):
                lengths = (2 + rng.exponential(30, count)).astype(np.int32).clip(2, LONGEST)
                tokens = rng.integers(4, 12, lengths.sum()).astype(np.uint16)
                tokens[np.cumsum(lengths) - 1] = 2
                path = shard / f"train.{pair}.{lang}"
                path.with_name(f"{path.name}.bin").write_bytes(tokens.tobytes())
                write_index(f"{path}.idx", lengths, tokens.dtype)


@pytest.fixture(scope="module")
def folder(make_once):
    return make_once("drawn-pairs", write_corpus)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that few sentences are many chunks."""
    monkeypatch.setattr(drawn_pairs, "CHUNK", 97)
    monkeypatch.setattr(drawn_pairs.chunks, "__defaults__", (97,))


def both(task, epoch):
    """The training set, and what it would be with fairseq's classes."""
    how = {"epoch": epoch, "combine": True, "shard_epoch": epoch}
    ours = task.data_manager.load_dataset("train", True, **how)
    stock = MultilingualDatasetManager.load_dataset(task.data_manager, "train", True, **how)
    assert isinstance(ours, SampledMultiDataset)
    return ours, stock


def batches_of(task, dataset, epoch, seed=1, rank=(0, 1), **more):
    """The batches of an epoch in the order of training, and where they begin and end."""
    options = {"max_tokens": 1000, "required_batch_size_multiple": 8, **more}
    iterator = task.get_batch_iterator(
        dataset,
        max_positions=(200, 250),
        seed=seed,
        epoch=epoch,
        num_shards=rank[1],
        shard_id=rank[0],
        **options,
    )
    iterator.next_epoch_itr(shuffle=True)
    batches = iterator.epoch_batch_sampler.batches
    indices = np.concatenate(batches).astype(np.int64)
    return indices.tobytes(), list(map(len, batches)), iterator


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_temperature": 1},
        {"sampling_temperature": 5, "seed": 3},
        {"sampling_method": "concat"},
        {"sampling_temperature": 2, "virtual_epoch_size": 1500, "virtual_data_size": 4000},
        {"sampling_temperature": 1, "lang_tok_replacing_bos_eos": True},
        {"sampling_temperature": 1, "truncate_source": True, "max_source_positions": 150},
    ],
    ids=str,
)
def test_the_batches_are_those_of_fairseqs_data_sets(options, folder):
    task = set_up(folder, lang_pairs=",".join(DIRECTIONS), **options)[1]
    for epoch in (1, 2):
        ours, stock = both(task, epoch)
        assert type(stock).__module__.startswith("fairseq.") and type(ours) is not type(stock)
        assert ours._cur_indices.dtype == np.int32
        np.testing.assert_array_equal(ours._cur_indices, stock._cur_indices)
        np.testing.assert_array_equal(ours.sizes, stock.sizes)
        ways = [((0, 1), {}), ((1, 3), {"max_sentences": 7})]
        for rank, more in [*ways, ((0, 1), {"required_batch_size_multiple": 1})]:
            seed = task.args.seed + epoch
            found, lengths, ours_itr = batches_of(task, ours, epoch, seed, rank, **more)
            expected, stock_lengths, stock_itr = batches_of(task, stock, epoch, seed, rank, **more)
            assert lengths == stock_lengths and found == expected
        # a training that goes on in this epoch
        for iterator in (ours_itr, stock_itr):
            iterator.load_state_dict({"version": 2, "epoch": epoch, "iterations_in_epoch": 5})
        goes_on = [itr.epoch_batch_sampler.batches for itr in (ours_itr, stock_itr)]
        assert list(map(list, goes_on[0])) == list(map(list, goes_on[1]))
        index = goes_on[0][0][0]
        assert (ours.size(index) == stock.size(index)).all()
        assert ours.num_tokens(index) == stock.num_tokens(index)
        sample, other = (data.collater([data[i] for i in goes_on[0][0]]) for data in (ours, stock))
        assert sample["target"].equal(other["target"])
        assert sample["net_input"]["src_tokens"].equal(other["net_input"]["src_tokens"])


def test_drawing_is_numpys():
    for size, number in ((1, 0), (1, 3), (10, 7), (10, 10), (10, 34)):
        rng, other = np.random.RandomState(7), np.random.RandomState(7)
        rest = other.choice(size, number % size, replace=False)
        expected = np.concatenate([np.tile(np.arange(size), number // size), rest])
        assert draw_evenly(size, rng, number).tolist() == expected.tolist()
        assert rng.randint(1 << 30) == other.randint(1 << 30)  # the next draws as well


def test_sorting_in_chunks_is_stable():
    rng = np.random.default_rng(1)
    for size, largest in ((0, 1), (1, 1), (97, 3), (98, 300), (5000, 40)):
        keys = rng.integers(0, largest, size).astype(np.uint16)
        order = rng.permutation(size).astype(np.int32)
        expected = order[np.argsort(keys[order], kind="stable")]
        found = stable_order(order, keys)
        assert found.dtype == np.int32 and found.tolist() == expected.tolist()


def test_a_batch_larger_than_a_chunk(folder):
    task = set_up(folder, lang_pairs=",".join(DIRECTIONS))[1]
    found, expected = (batches_of(task, each, 1, max_tokens=10**6)[:2] for each in both(task, 1))
    assert found == expected and max(found[1]) > 1000


@pytest.mark.slow
def test_20_million_pairs_in_200_directions_start_in_1_gib(tmp_path):
    """Beyond what a training of a few sentences takes, mapped files included."""
    results = tmp_path / "results.json"
    words = ("--pairs", "100", "--sentences", "20000000", "--json", results, "--folder", tmp_path)
    script = toy_task.REPOSITORY / "scripts" / "bench_many_pairs.py"
    subprocess.run([sys.executable, script, *words], check=True, env=toy_task.environment())
    small, large = (json.loads(results.read_text())[name][0] for name in ("small", "large"))
    assert large["resident_mib"] - small["resident_mib"] < 1024
    assert large["cpu_seconds"] < 60
