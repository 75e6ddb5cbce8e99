"""Sentence pairs whose sizes stay in the mapped files.

fairseq's data sets copy the sizes of all sentences when they are made: for each side of each
direction once with the language token, once more for the pair, and once as rows of two.
"""

import os

import numpy as np
from fairseq.data import LanguagePairDataset, PrependTokenDataset


class Sizes:
    """Sizes of the sentences of a data set, each ``more`` than in the file.

    Args:
        dataset: is held, because its memory is unmapped with it.
        sizes: (N,) integers.
    """

    def __init__(self, dataset, sizes, more):
        self._dataset, self._sizes, self._more = dataset, sizes, more

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, indices):
        return self._sizes[indices] + self._more

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


class PrependToken(PrependTokenDataset):
    """fairseq's, without a copy of the sizes."""

    def __init__(self, dataset, token=None):
        super().__init__(dataset)  # without a token, it copies nothing
        self.token = token
        if token is not None:
            self._sizes = Sizes(dataset, dataset.sizes, 1)


class SentencePairs(LanguagePairDataset):
    """fairseq's, without copies of the sizes.

    Attributes:
        src_sizes, tgt_sizes: as given; they can be indexed by an array of sentences.
    """

    def __init__(self, src, src_sizes, src_dict, tgt=None, tgt_sizes=None, *args, **kwargs):
        none_yet = None if tgt_sizes is None else ()
        super().__init__(src, (), src_dict, tgt, none_yet, *args, **kwargs)
        self.src_sizes, self.tgt_sizes = src_sizes, tgt_sizes

    @property
    def sizes(self):
        """(N, 2), or (N,) without a target side; made anew by each call."""
        sides = [side for side in (self.src_sizes, self.tgt_sizes) if side is not None]
        columns = [np.array(side) for side in sides]
        return np.stack(columns, 1) if len(columns) > 1 else columns[0]

    @sizes.setter
    def sizes(self, empty):
        """fairseq sets it to what it makes of the sizes that it was given."""


def read_ahead(path):
    """Have the system read a file into memory while this process goes on. fairseq reads all of it
    before it goes on."""
    with open(path, "rb") as handle:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
