"""Batches of sentences to translate, all of which fit the model."""

from functools import wraps

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.shortened import ShortenedDataset


def fit_batches(task, check, skip=False, with_targets=False):
    """Let a task cut overlong sentences instead of ending at the first of them.

    Args:
        check: called with every :class:`ShortenedDataset`, and the numbers of tokens that the model
            takes of source and target.
        skip: leave out overlong sentences, as fairseq does if asked to.
        with_targets: the model also gets the targets, which are cut as well.
    """
    stock = task.get_batch_iterator

    @wraps(stock)
    def get_batch_iterator(
        dataset, max_tokens=None, max_positions=None, ignore_invalid_inputs=False, **options
    ):
        longest, longest_target = limits = max_positions
        fitting = ShortenedDataset(dataset, longest, longest_target if with_targets else None)
        check(fitting, limits)
        if not skip:
            max_positions = None
        elif (fitting.original_sizes > limits).any(axis=1).all():
            raise OptionError(
                "--skip-invalid-size-inputs-valid-test: every sentence is too long; leave the "
                "option out to translate their beginnings"
            )
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
