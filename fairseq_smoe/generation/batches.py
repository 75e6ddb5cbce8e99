"""Batches of sentences to translate, all of which fit the model."""

from functools import wraps

import numpy as np

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.shortened import ShortenedDataset


def fit_batches(task, check, skip=False, with_targets=False):
    """Let a task cut overlong sentences instead of ending at the first of them.

    Args:
        check: called with every :class:`ShortenedDataset` and the number of tokens that a source
            may have.
        skip: leave out overlong sentences, with fairseq's warning.
        with_targets: the model also gets the targets, which are cut as well.
    """
    stock = task.get_batch_iterator

    @wraps(stock)
    def get_batch_iterator(
        dataset, max_tokens=None, max_positions=None, ignore_invalid_inputs=False, **options
    ):
        longest, longest_target = max_positions
        fitting = ShortenedDataset(dataset, longest, longest_target if with_targets else None)
        if skip:
            if (np.asarray(fitting.original_sizes) > max_positions).any(1).all():
                raise OptionError(
                    "--skip-invalid-size-inputs-valid-test: every sentence has more than the "
                    f"{longest} tokens that the model takes; leave it out to translate their "
                    "beginnings"
                )
        else:
            check(fitting, longest)
            max_positions = None
        if max_tokens is not None and len(fitting):
            # a batch of one sentence is always possible
            max_tokens = max(max_tokens, int(fitting.num_tokens_vec(slice(None)).max()))
        return stock(
            fitting,
            max_tokens=max_tokens,
            max_positions=max_positions,
            ignore_invalid_inputs=skip,
            **options,
        )

    task.get_batch_iterator = get_batch_iterator
