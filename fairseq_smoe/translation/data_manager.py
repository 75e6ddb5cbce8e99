"""The data of many directions: finds the files, opens each once, and determines their sizes.

A pair's files are ``SPLIT.A-B.A.{bin,idx}`` and ``SPLIT.A-B.B.{bin,idx}`` in the data folder. They
are used for both directions. Training files may be in its subfolders ``shard000``, ``shard001``,
... instead. Pairs may have different numbers of shards. In epoch e, a direction with S shards reads
shard (e - 1) modulo S.
"""

import itertools
import logging
import os
import re
import struct
from bisect import bisect_right
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from fairseq import utils
from fairseq.data import ConcatDataset, data_utils, indexed_dataset
from fairseq.data.multilingual import multilingual_data_manager
from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager

from fairseq_smoe.errors import OptionError
from fairseq_smoe.patching import replaced
from fairseq_smoe.translation.drawn_pairs import (
    SampledMultiDataset,
    SampledMultiEpochDataset,
    draw_evenly,
)
from fairseq_smoe.translation.hyphens import explain_hyphens
from fairseq_smoe.translation.mapped_sizes import PrependToken, SentencePairs, read_ahead

logger = logging.getLogger(__name__)


class DirectionDataset(ConcatDataset):
    """The datasets of several directions as one, whose batches know each sentence's direction.

    A batch gets two more entries: ``direction``, (B,) int64, the index of each sentence's
    direction, and ``position``, (B,) int64, the sentence's index in the dataset of its direction.
    ``id`` is the index over all datasets.
    """

    def __init__(self, datasets, directions):
        super().__init__(datasets)
        self.directions = torch.tensor(directions)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["id"] = index
        return sample

    def collater(self, samples, **extra_args):
        batch = super().collater(samples, **extra_args)
        if batch:
            datasets = [bisect_right(self.cumulative_sizes, i) for i in batch["id"].tolist()]
            batch["direction"] = self.directions[datasets]
            starts = torch.tensor([0, *self.cumulative_sizes])
            batch["position"] = batch["id"] - starts[datasets]
        return batch


class DirectionDataManager(MultilingualDatasetManager):
    """fairseq's data manager, adapted to folders with a hundred pairs.

    * It opens a file once for both directions of a pair, and reads identical dictionaries once.
    * It finds the shards in the data folder. From the first epoch on, sampling uses the size of all
      shards of a direction.
    * It draws the sentences of a direction equally often.
    * It leaves the sizes of sentences in the files, and keeps 8 bytes for each pair of a training
      set.
    * It leaves directions without validation or test files out of those splits.
    * It opens a set without a target side, to translate it.

    Attributes:
        needs_target: whether the target side has to be there.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.needs_target = True
        self._open_files = WeakValueDictionary()  # closed with the last dataset that uses one

    @classmethod
    def load_all_dictionaries(cls, args, language_list, load_dictionary, training):
        """``{language: Dictionary}``; languages with identical files share one object.

        Raises:
            OptionError: a dictionary is missing.
        """
        loaded = {}

        def load_once(path):
            if not training and not os.path.isfile(path) and args.source_lang:
                # all languages have the same dictionary; data to translate may have one side only
                folder, name = os.path.split(path)
                if name == f"dict.{args.target_lang}.txt":
                    path = os.path.join(folder, f"dict.{args.source_lang}.txt")
            if not os.path.isfile(path):
                raise OptionError(
                    f"{path}: no such dictionary; give a data folder with one for every language "
                    "of --lang-pairs"
                )
            content = Path(path).read_bytes()
            if content not in loaded:
                loaded[content] = load_dictionary(path)
            return loaded[content]

        return super().load_all_dictionaries(args, language_list, load_once, training)

    def load_dataset(self, *args, **kwargs):
        """The dataset of all directions of a split, with classes that need less memory."""
        with replaced(
            multilingual_data_manager,
            LanguagePairDataset=SentencePairs,
            PrependTokenDataset=PrependToken,
            SampledMultiDataset=SampledMultiDataset,
            SampledMultiEpochDataset=SampledMultiEpochDataset,
        ):
            return super().load_dataset(*args, **kwargs)

    def load_data(self, path, vdict, impl):
        """The dataset of one file, without language tokens; all directions that use it share it."""
        dataset = self._open_files.get(path)
        if dataset is None:
            found = indexed_dataset.infer_dataset_impl(path)
            if impl is not None and impl != found and (impl == "mmap" or found == "mmap"):
                raise OptionError(
                    f"--dataset-impl {impl}: {path}.idx has the format {found}; leave it out, the "
                    "format is recognised"
                )
            with replaced(indexed_dataset, _warmup_mmap_file=read_ahead):
                dataset = super().load_data(path, vdict, impl)
            if dataset is None:
                logger.info(f"{path}: no such files, no references")
            elif not dataset.supports_prefetch:  # with prefetching, it cannot be shared
                self._open_files[path] = dataset
        return dataset

    def load_lang_dataset(self, *args, max_source_positions, **kwargs):
        """The two sides of a direction. With --truncate-source, fairseq forgets the language token,
        which is added to what it has truncated."""
        specs = self.args.langtoks.values()
        if any(source for source, _ in specs) and not self.args.lang_tok_replacing_bos_eos:
            max_source_positions -= 1
        return super().load_lang_dataset(*args, max_source_positions=max_source_positions, **kwargs)

    def load_a_dataset(self, *args, **kwargs):
        """The dataset of one direction, whose sentences are drawn equally often."""
        dataset = super().load_a_dataset(*args, **kwargs)
        # fairseq's multilingual tasks do not pass it on
        dataset.pad_to_multiple = getattr(self.args, "required_seq_len_multiple", 1)
        # fairseq calls this to draw sentences. Its own version draws all of them with replacement
        # if it wants one sentence more than there are, and thus misses a third of a direction that
        # it means to read once
        dataset.random_choice_in_dataset = partial(draw_evenly, len(dataset))
        return dataset

    def get_data_paths_and_lang_pairs(self, split):
        """The folders of a split and its directions: in training, all of --lang-pairs; else those
        of --lang-pairs that have files.

        Raises:
            OptionError: a training direction, or every direction of another split, has no files.
        """
        data_paths, lang_pairs = super().get_data_paths_and_lang_pairs(split)
        for_training = split == getattr(self.args, "train_subset", None)
        folders = find_shards(self.args.data)
        if not for_training:
            folders = utils.split_paths(self.args.data)[:1]  # as fairseq does
        present = find_all_pairs(folders, split)
        found = [d for d in self.lang_pairs if pair_of(d, present)]
        if not (found or self.needs_target):
            found = [d for d in self.lang_pairs if has_source(folders[0], split, d)]
        missing = [d for d in self.lang_pairs if d not in found]
        if not found or (missing and for_training):
            raise OptionError(_explain_missing(self.args, missing[0], split, for_training, present))
        return {**data_paths, "main": os.pathsep.join(folders)}, {**lang_pairs, "main": found}

    def get_split_data_param_list(self, split, epoch, shard_epoch=None):
        """The parameters of each direction's dataset, with the shard that this epoch reads."""
        params = super().get_split_data_param_list(split, epoch, shard_epoch)
        shards = self._shards_by_key(split)
        for param in params:
            # fairseq counts the n folders of a direction, but then uses the first n of all folders
            if folders := shards.get(param["key"]):
                shard = self.get_shard_id(len(folders), epoch, shard_epoch)
                param["data_path"] = folders[shard]
        left_out = [d for d in self.lang_pairs if f"main:{d}" not in shards]
        if left_out:
            logger.info(f"[{split}] no sentences, left out: {', '.join(left_out)}")
        return params

    def get_train_dataset_sizes(self, data_param_list, datasets, epoch, shard_epoch=None):
        """Number of sentences of each direction in all its shards, from the files' headers. fairseq
        would assume that shards that are not loaded yet are as large as the largest one so far."""
        split = data_param_list[0]["split"]
        for key, folders in self._shards_by_key(split).items():
            if len(folders) > 1:
                direction = key.partition(":")[2]
                sizes = [self._count_sentences(folder, split, direction) for folder in folders]
                self._training_data_sizes[key].update(enumerate(sizes))
        return super().get_train_dataset_sizes(data_param_list, datasets, epoch, shard_epoch)

    def get_sampling_ratios(self, data_param_list, datasets, *args, **kwargs):
        """The weight of each direction in sampling.

        Raises:
            OptionError: --sampling-weights or --sampling-weights-from-file lack one.
        """
        try:
            return super().get_sampling_ratios(data_param_list, datasets, *args, **kwargs)
        except KeyError as error:
            from_file = self.args.sampling_weights_from_file
            option = "--sampling-weights" + (f"-from-file {from_file}" if from_file else "")
            needed = ", ".join(key for key, _ in datasets)
            raise OptionError(
                f"{option}: no weight for {error}; give one for each of {needed}"
            ) from error

    def _shards_by_key(self, split):
        """``{"main:en-de": [folders with files of this direction]}``, without those of
        --extra-data."""
        data_paths, lang_pairs = self.get_data_paths_and_lang_pairs(split)
        folders = utils.split_paths(data_paths["main"])
        pairs = {folder: find_pairs(folder, split) for folder in folders}
        return {
            self.get_dataset_key("main", *direction.split("-")): [
                folder for folder in folders if pair_of(direction, pairs[folder])
            ]
            for direction in lang_pairs["main"]
        }

    def _count_sentences(self, folder, split, direction):
        """Number of sentences of a direction in a folder, in all files that fairseq concatenates
        for a split: train, train1, train2, ..."""
        source = direction.split("-")[0]
        counts = []
        for k in itertools.count():
            part = os.path.join(folder, f"{split}{k or ''}")
            pairs = (direction, reverse_of(direction))
            prefixes = [f"{part}.{pair}.{source}" for pair in pairs]
            found = [p for p in prefixes if indexed_dataset.dataset_exists(p, "mmap")]
            if not found:
                break
            counts.append(count_sentences(found[0]))
        if len(counts) > 1:
            counts[0] *= self.args.upsample_primary
        return sum(counts)

    def load_into_concat_dataset(self, split, datasets, data_param_list):
        """One dataset of all directions of a validation or test set, one after another."""
        dataset = super().load_into_concat_dataset(split, datasets, data_param_list)
        if not isinstance(dataset, ConcatDataset):
            return dataset
        directions = [f"{param['src']}-{param['tgt']}" for param in data_param_list]
        return DirectionDataset(dataset.datasets, [self.lang_pairs.index(d) for d in directions])


def check_training_files(args):
    """Check that every direction of ``args.lang_pairs`` has training files.

    Raises:
        OptionError: names the first direction that has none.
    """
    split, directions = args.train_subset, args.lang_pairs
    if isinstance(directions, str):
        directions = directions.split(",")
    present = find_all_pairs(find_shards(args.data), split)
    for direction in directions:
        if pair_of(direction, present) is None:
            raise OptionError(_explain_missing(args, direction, split, True, present))
    for name, directions in (args.extra_lang_pairs or {}).items():
        folders = utils.split_paths(args.extra_data[name])
        present = find_all_pairs(filter(os.path.isdir, folders), split)
        for direction in directions.split(","):
            if pair_of(direction, present) is None:
                raise OptionError(
                    f"--extra-lang-pairs {name}: no {split} sentences of {direction} in "
                    f"{args.extra_data[name]}; leave this direction out"
                )


def _explain_missing(args, direction, split, for_training, present):
    option, remedy = f"--lang-pairs {direction}", "leave this direction out"
    if args.source_lang:
        option = "--source-lang {0.source_lang} --target-lang {0.target_lang}".format(args)
        remedy = "choose one of them or another --gen-subset"
    elif not for_training:
        option = f"--valid-subset {split}"
        remedy = "name another set or give --disable-validation"
    some = ", ".join(sorted(present)[:5] + ["..."] * (len(present) > 5))
    if hyphenated := explain_hyphens(find_shards(args.data), split):
        remedy = hyphenated
    return (
        f"{option}: no {split} sentences of {direction} in {args.data}, which has "
        f"{f'some of {some}' if some else 'none at all'}; {remedy}"
    )


def find_shards(data):
    """Folders of the training files. If ``data`` lists several folders, joined by colons, these;
    else its subfolders ``shard000``, ``shard001``, ... if any; else ``data`` itself."""
    folders = utils.split_paths(data)
    if len(folders) > 1:
        return folders
    names = [name for name in os.listdir(data) if re.fullmatch(r"shard\d+", name)]
    names.sort(key=lambda name: int(name[len("shard") :]))
    return [os.path.join(data, name) for name in names] or folders


def find_pairs(folder, split):
    """Names ``A-B`` of the pairs that have all their files of a split in a folder. Files without
    sentences do not count; fairseq cannot open them."""
    names = {entry.name for entry in os.scandir(folder) if entry.stat().st_size > 0}
    indices = (re.fullmatch(rf"{re.escape(split)}\.([^.]+-[^.]+)\.[^.]+\.idx", n) for n in names)
    return {
        pair
        for pair in {match[1] for match in indices if match}
        if all(
            f"{split}.{pair}.{lang}.{kind}" in names
            for lang in pair.split("-")
            for kind in ("idx", "bin")
        )
    }


def has_source(folder, split, direction):
    """Whether a folder has the source side of a split in a direction, in a pair's usual files."""
    source = direction.split("-")[0]
    prefixes = [
        os.path.join(folder, f"{split}.{d}.{source}") for d in (direction, reverse_of(direction))
    ]
    return any(
        all(os.path.isfile(f) and os.path.getsize(f) for f in (f"{p}.idx", f"{p}.bin"))
        for p in prefixes
    )


def find_all_pairs(folders, split):
    """Names of the pairs that have all their files of a split in one of the folders."""
    return set().union(*(find_pairs(folder, split) for folder in folders))


def all_directions(data, split):
    """Both directions of every pair that has files of a split, in alphabetical order."""
    pairs = find_all_pairs(find_shards(data), split)
    return sorted({d for pair in pairs for d in (pair, reverse_of(pair))})


def pair_of(direction, pairs):
    """The one of ``pairs`` that has a direction: the direction itself or its reverse; or None."""
    return next((pair for pair in (direction, reverse_of(direction)) if pair in pairs), None)


def reverse_of(direction):
    """``"en-de"`` -> ``"de-en"``"""
    return "-".join(reversed(direction.split("-")))


def count_sentences(prefix):
    """Sentences in ``prefix.idx``, from its first 26 bytes if it has the usual format."""
    magic = indexed_dataset.MMapIndexedDataset.Index._HDR_MAGIC
    with open(indexed_dataset.index_file_path(prefix), "rb") as handle:
        header = handle.read(len(magic) + struct.calcsize("<QBQ"))
    if not header.startswith(magic):
        return len(data_utils.load_indexed_dataset(prefix))
    _version, _dtype, count = struct.unpack("<QBQ", header[len(magic) :])
    return count
