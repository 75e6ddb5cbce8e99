"""All sentences are in a batch, and other tasks keep fairseq's batches."""

import numpy as np
import pytest
from fairseq.data import data_utils

from fairseq_smoe.translation.last_batch import with_the_last_batch


def make_batches(indices, max_tokens):
    return data_utils.batch_by_size(
        indices,
        num_tokens_fn=None,
        num_tokens_vec=indices % 9 + 3,
        max_tokens=max_tokens,
        required_batch_size_multiple=8,
    )


@pytest.mark.parametrize("num_sentences", [1, 7, 13, 100])
@pytest.mark.parametrize("max_tokens", [40, 1000])
def test_every_sentence_is_in_a_batch(num_sentences, max_tokens):
    indices = np.random.default_rng(0).permutation(num_sentences)
    batches = with_the_last_batch(make_batches)(indices, max_tokens)
    assert np.concatenate(batches).tolist() == indices.tolist()


def test_fairseq_leaves_sentences_out_otherwise():
    with_the_last_batch(make_batches)(np.arange(13), 1000)
    assert sum(map(len, make_batches(np.arange(13), 1000))) == 8
