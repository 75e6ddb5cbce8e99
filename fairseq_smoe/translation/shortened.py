"""Cutting sentences that are longer than a model takes."""

import numpy as np
import torch
from fairseq.data import BaseWrapperDataset, FairseqDataset


def shorten(tokens, longest):
    """Cut ``tokens``, (S,) int64, in front of the last, the end of sentence."""
    if len(tokens) <= longest:
        return tokens
    return torch.cat([tokens[: longest - 1], tokens[-1:]])


def describe_long(where, longest, consequence="the end is not translated", side="source"):
    """A warning's text.

    Args:
        where: what is too long, such as ``"standard input, line 3"``.
        longest: tokens that the model takes, language token and end of sentence included.
    """
    return (
        f"{where}: more than the {longest} tokens that the model takes "
        f"(--max-{side}-positions in training); {consequence}"
    )


def first_few(numbers, most=10):
    """``"3, 5, 8"``; of many numbers the first, and how many there are."""
    text = ", ".join(str(number) for number in numbers[:most])
    return text if len(numbers) <= most else f"{text}, ... ({len(numbers)} in all)"


class ShortenedDataset(BaseWrapperDataset):
    """A fairseq data set of sentence pairs whose overlong sides are cut.

    fairseq-generate ends with an error at such a sentence. Here the rest of the test set is
    translated.

    Args:
        dataset: its items have ``source``, (S,) int64 with the end of sentence last, and the same
            for ``target``, or None.
        longest: tokens of a source at most.
        longest_target: tokens of a target at most; None to leave targets as they are, for which a
            model has no use.

    Attributes:
        longest: as given.
        has_target: whether the sentences have a target side.
        original_sizes: (N, 2) int64, tokens of source and target; 0 without a target.
    """

    def __init__(self, dataset, longest, longest_target=None):
        super().__init__(dataset)
        sizes = np.asarray(dataset.sizes)  # (N, 2), or (N,) without target
        self.has_target = sizes.ndim == 2
        if not self.has_target:
            sizes = np.stack([sizes, np.zeros_like(sizes)], 1)
        self.original_sizes = sizes
        self.longest = longest
        self._longest = longest, longest_target or np.iinfo(np.int64).max
        self._sizes = np.minimum(sizes, self._longest)
        # a target that is only printed takes no room in a batch, however long it is
        self._num_tokens = np.minimum(self._sizes, longest).max(axis=1)

    def __getitem__(self, index):
        found = self.dataset[index]
        # from the data set for --lang-tok-replacing-bos-eos: (number of a data set, item)
        *number, item = found if isinstance(found, tuple) else (found,)
        item = dict(item)
        for side, longest in zip(("source", "target"), self._longest):
            if item[side] is not None:
                item[side] = shorten(item[side], longest)
        return (*number, item) if number else item

    @property
    def sizes(self):
        """(N, 2) int64: the same after cutting."""
        return self._sizes

    def shortened(self, side=0):
        """Indices of the sentences whose source (side 0) or target (1) is cut."""
        return np.flatnonzero(self.original_sizes[:, side] > self._longest[side])

    def num_tokens(self, index):
        return self._num_tokens[index]

    def num_tokens_vec(self, indices):
        return self._num_tokens[indices]

    def size(self, index):
        return tuple(self._sizes[index])

    def batch_by_size(self, *args, **kwargs):
        return FairseqDataset.batch_by_size(self, *args, **kwargs)  # by this one's sizes
