"""The training set: sentence pairs drawn from all directions, their order and their batches.

The pairs, their order and their batches are those of fairseq's data sets, in less memory. For each
drawn pair, a training keeps two numbers of 4 bytes: which sentence it is, and its place in the
order. While the batches are made, there is a second order, and the sizes of both sides in a byte or
two each.
"""

import numpy as np
from fairseq.data.multilingual import sampled_multi_dataset, sampled_multi_epoch_dataset

CHUNK = 1 << 20  # pairs that are looked at together


def index_type(number):
    """The type of indices below ``number``."""
    return np.int32 if number <= np.iinfo(np.int32).max else np.int64


def shuffled(number, rng):
    """``rng.permutation(number)``, in half of the memory."""
    order = np.arange(number, dtype=index_type(number))
    rng.shuffle(order)
    return order


def draw_evenly(size, rng, number):
    """``number`` indices below ``size``; their numbers of occurrences differ by at most one."""
    passes, rest = divmod(number, size)
    drawn = np.empty(number, index_type(size))
    drawn[: passes * size].reshape(passes, size)[:] = np.arange(size, dtype=drawn.dtype)
    drawn[passes * size :] = shuffled(size, rng)[:rest]  # as rng.choice without replacement
    return drawn


def chunks(start, stop, size=CHUNK):
    """``slice`` objects that cover ``range(start, stop)``."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def stable_order(order, keys):
    """``order[np.argsort(keys[order], kind="stable")]``, chunk by chunk.

    Args:
        order: (N,) all indices below N.
        keys: (N,) unsigned integers, few of which are different.
    """
    counts = np.zeros(int(keys.max(initial=0)) + 1, np.int64)
    for part in chunks(0, len(keys)):
        counts += np.bincount(keys[part], minlength=len(counts))
    next_place = np.cumsum(counts) - counts  # of each key
    result = np.empty_like(order)
    for part in chunks(0, len(order)):
        indices = order[part]
        found = keys[indices]
        sort = np.argsort(found, kind="stable")
        counts = np.bincount(found, minlength=len(next_place))
        # places of the first of each key, minus where they stand in this chunk
        shift = next_place - (np.cumsum(counts) - counts)
        result[shift[found[sort]] + np.arange(len(sort))] = indices[sort]
        next_place += counts
    return result


class DrawnPairs:
    """What fairseq's two data sets for sampling have in common, in less memory."""

    _columns = _columns_of = None  # sizes of (source, target), and the epoch that they belong to

    def get_virtual_indices(self, rng, datasets, sample_ratios, virtual_size):
        if sample_ratios is not None:
            return super().get_virtual_indices(rng, datasets, sample_ratios, virtual_size)
        # fairseq makes lists of Python's integers
        sizes = np.array([len(dataset) for dataset in datasets], np.int64)
        kind = index_type(max(sizes))
        return np.hstack([np.arange(size, dtype=kind) for size in sizes]), np.cumsum(sizes), sizes

    @property
    def sizes(self):
        """(N, 2) int32, tokens of source and target of the drawn pairs, or (N,) of a set without
        targets; made anew by each call."""
        source, target = self._sides()
        if any(_sizes_of(dataset)[1] is None for dataset in self.datasets):
            return source.astype(np.int32)
        return np.stack((source, target), 1).astype(np.int32)

    def size(self, index):
        number, sentence = self._get_dataset_and_index(index)
        sides = _sizes_of(self.datasets[number])
        return np.array([sizes[sentence] for sizes in sides if sizes is not None])

    def num_tokens(self, index):
        return self.size(index).max()

    def num_tokens_vec(self, indices):
        source, target = self._sides()
        return np.maximum(source[indices], target[indices])

    def ordered_indices(self):
        """By length of the source, then of the target, then at random if ``shuffle``."""
        number = len(self)
        if self.shuffle:
            order = shuffled(number, np.random)
        else:
            order = np.arange(number, dtype=index_type(number))
        source, target = self._sides()
        order = stable_order(order, target)
        return stable_order(order, source)

    def filter_indices_by_size(self, indices, max_sizes):
        """``(kept, others)``, arrays of those indices that are not longer than ``max_sizes``, and
        of those that are."""
        if max_sizes is None:
            return indices, indices[:0]
        most = (max_sizes,) * 2 if isinstance(max_sizes, int | float) else max_sizes
        keep = np.ones(len(indices), bool)
        for side, longest in zip(self._sides(), most, strict=True):
            for part in chunks(0, len(indices)):
                keep[part] &= side[indices[part]] <= longest
        return (indices, indices[:0]) if keep.all() else (indices[keep], indices[~keep])

    def batch_by_size(self, indices, *args, **kwargs):
        """fairseq's batches of a part of the indices after another."""
        batches, start, size = [], 0, CHUNK
        while start < len(indices):
            window = indices[start : start + size].astype(np.int64)
            found = super().batch_by_size(window, *args, **kwargs)
            is_last = start + size >= len(indices)
            # with more indices behind it, the last batch could be another; a rest that would not
            # fill it up is a batch of its own
            found = found if is_last else found[:-2]
            for batch in found:
                batches.append(indices[start : start + len(batch)])
                start += len(batch)
            if is_last:
                break  # fairseq may leave out the last few
            if not found:
                size *= 2  # a batch is larger
        self._columns = self._columns_of = None  # what follows asks for single pairs
        return batches

    def _sides(self):
        """Sizes of source and target of the pairs of this epoch, as small unsigned integers."""
        if self._columns_of != self._cur_epoch or self._columns is None:
            self._columns = None
            self._columns = tuple(self._of_this_epoch(self._sizes_of_side(i)) for i in (0, 1))
            self._columns_of = self._cur_epoch
        return self._columns

    def _of_this_epoch(self, sizes):
        return sizes

    def _sizes_of_side(self, side):
        result = np.empty(len(self._cur_indices), np.uint8)
        start = 0
        for dataset, stop in zip(self.datasets, self.cumulated_sizes.tolist(), strict=True):
            sizes = _sizes_of(dataset)[side]
            if sizes is None:  # no targets
                sizes = np.zeros(len(dataset), np.uint8)
            for part in chunks(start, stop):
                found = sizes[self._cur_indices[part]]
                largest = found.max(initial=0)
                if largest > np.iinfo(result.dtype).max:
                    result = result.astype(np.min_scalar_type(largest))
                result[part] = found
            start = stop
        return result


class SampledMultiDataset(DrawnPairs, sampled_multi_dataset.SampledMultiDataset):
    """fairseq's; of the same name, by which it seeds its draws."""


class SampledMultiEpochDataset(DrawnPairs, sampled_multi_epoch_dataset.SampledMultiEpochDataset):
    """fairseq's for --virtual-epoch-size; of the same name, by which it seeds its draws."""

    def _next_global_indices(self, epoch):
        super()._next_global_indices(epoch)
        number = len(self._random_global_indices)
        self._random_global_indices = self._random_global_indices.astype(index_type(number))

    def _of_this_epoch(self, sizes):
        start = self._current_epoch_start_index
        return sizes[self._random_global_indices[start : start + len(self)]]


def _sizes_of(dataset):
    """Sizes of both sides of a direction's data set."""
    pairs = getattr(dataset, "dataset", dataset)  # --lang-tok-replacing-bos-eos wraps it
    return pairs.src_sizes, pairs.tgt_sizes
