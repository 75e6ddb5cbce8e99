"""Batches of all sentences of a data set."""

from functools import wraps

from fairseq.data import data_utils

from fairseq_smoe.patching import replaced


def with_the_last_batch(make_batches):
    """A function that makes batches by size, so that all sentences are in one.

    The installed fairseq drops the last batch if its size is not a multiple of
    --required-batch-size-multiple (default 8). Some sentences of a test set would not be translated
    and scored, without a warning.
    """

    @wraps(make_batches)
    def make(*args, **kwargs):
        with replaced(data_utils, batch_by_size=batch_by_size):
            return make_batches(*args, **kwargs)

    stock = data_utils.batch_by_size

    def batch_by_size(indices, *args, **kwargs):
        batches = list(stock(indices, *args, **kwargs))
        batched = sum(map(len, batches))
        if batched < len(indices):  # batches are consecutive parts of the indices
            batches.append(indices[batched:])
        return batches

    return make
