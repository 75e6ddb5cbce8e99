"""How often each vocabulary entry occurs in the training text of a language."""

import itertools
import json
from pathlib import Path

import numpy as np
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import MMapIndexedDataset

from fairseq_smoe.files import whole_file
from fairseq_smoe.translation.data_manager import find_pairs, find_shards

CHUNK = 1 << 24  # tokens at a time


class TrainingFrequencies:
    """Counts per language over all binarised training files of a data folder.

    A file serves both directions of its pair, and is counted once. Counts are kept in ``cache``,
    one file per language, and recomputed when the training files have changed.
    """

    def __init__(self, data, cache, dictionary, split="train"):
        """
        Args:
            data: data folder, as for fairseq-train.
            cache: folder for the counts.
            dictionary: the vocabulary.
            split: name of the training set.
        """
        self.data = str(data)
        self.cache = Path(cache)
        self.dictionary = dictionary
        self.split = split
        self._known = {}

    def counts(self, lang):
        """(V,) int64, occurrences in the training text of ``lang``."""
        if lang not in self._known:
            self._known[lang] = self._cached(lang)
        return self._known[lang]

    def ranks(self, lang):
        """(V,) int64: 1 for the most frequent entry; equally frequent ones in vocabulary order."""
        ranks = np.empty(len(self.dictionary), dtype=np.int64)
        order = np.argsort(-self.counts(lang), kind="stable")
        ranks[order] = np.arange(1, len(order) + 1)
        return ranks

    def files(self, lang):
        """Training files of a language, without their endings."""
        found = []
        for folder in find_shards(self.data):
            for k in itertools.count():  # fairseq reads train, train1, train2, ...
                part = f"{self.split}{k or ''}"
                pairs = find_pairs(folder, part)
                if not pairs:
                    break
                found += [
                    str(Path(folder) / f"{part}.{pair}.{lang}")
                    for pair in sorted(pairs)
                    if lang in pair.split("-")
                ]
        return found

    def _cached(self, lang):
        files = self.files(lang)
        identity = json.dumps([_identity(f"{path}.bin") for path in files])
        path = self.cache / f"{lang}.npz"
        if path.exists():
            with np.load(path) as kept:
                counts = kept["counts"]
                if str(kept["identity"]) == identity and len(counts) == len(self.dictionary):
                    return counts
        counts = np.zeros(len(self.dictionary), dtype=np.int64)
        for file in files:
            counts += count_tokens(file, self.dictionary)
        self.cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as handle:
            np.savez_compressed(handle, counts=counts, identity=identity)
        return counts


def count_tokens(prefix, dictionary):
    """(V,) int64, occurrences of every vocabulary entry in a binarised file."""
    dataset = data_utils.load_indexed_dataset(prefix, dictionary)
    if isinstance(dataset, MMapIndexedDataset):
        # the file has the tokens of all sentences and nothing else
        tokens = np.frombuffer(dataset._bin_buffer, dtype=dataset._index.dtype)
        parts = (tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK))
    else:
        parts = (dataset[i].numpy() for i in range(len(dataset)))
    counts = np.zeros(len(dictionary), dtype=np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=len(dictionary))
    return counts


def _identity(path):
    status = Path(path).stat()
    return [path, status.st_size, status.st_mtime_ns]
