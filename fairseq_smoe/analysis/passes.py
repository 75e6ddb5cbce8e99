"""Teacher-forced passes of a model over the directions of a data set."""

import logging
import zlib

import numpy as np
import torch
from fairseq import utils
from fairseq.data import data_utils

from fairseq_smoe.evaluation.saved_model import read_saved_model, trained_directions

logger = logging.getLogger(__name__)


def load_model(checkpoint, data=None):
    """A trained model with its task, ready to run on the GPU if there is one.

    Args:
        checkpoint: a file of fairseq-train.
        data: data folder, instead of that of the training.

    Returns:
        ``(model, task, number of updates)``

    Raises:
        OptionError: it is no checkpoint of this project's task, or the data is of another.
    """
    saved = read_saved_model(checkpoint, data)
    model, task = saved.build(trained_directions(saved))
    if torch.cuda.is_available():
        model = model.cuda()
    return model, task, saved.num_updates


def direction_datasets(task, subset):
    """``{direction: its dataset}``, with language tokens, in the order of --lang-pairs.

    Of training files in several shards the first shard is taken.

    Raises:
        OptionError: there are no files of that subset.
    """
    manager = task.data_manager
    datasets, params = manager.load_split_datasets(subset, training=False)
    return {f"{p['src']}-{p['tgt']}": dataset for p, (_, dataset) in zip(params, datasets)}


def batches(dataset, max_positions, max_tokens, max_sentences=0, seed=1):
    """Batches of sentences of similar length.

    Args:
        max_positions: longer sentences, (source, target), are left out.
        max_tokens: per batch.
        max_sentences: take this many sentences, drawn without replacement; 0 for all.
        seed: seed of the draw.

    Returns:
        list of index arrays.
    """
    with data_utils.numpy_seed(seed):  # sentences of one length come in a random order
        indices = dataset.ordered_indices()
    indices, too_long = dataset.filter_indices_by_size(indices, max_positions)
    if len(too_long):
        logger.warning(f"left out {len(too_long)} sentences longer than {max_positions} tokens")
    if 0 < max_sentences < len(indices):
        drawn = np.random.default_rng(seed).choice(len(indices), max_sentences, replace=False)
        indices = indices[np.sort(drawn)]  # still by length
    return list(dataset.batch_by_size(indices, max_tokens=max_tokens))


def seed_of(direction):
    """A seed that differs between directions and is the same in every process."""
    return zlib.crc32(direction.encode())


@torch.no_grad()
def run_pass(model, dataset, batches, progress=None):
    """Send batches through encoder and decoder; hooks on the model see them."""
    device = next(model.parameters()).device
    for indices in batches:
        sample = dataset.collater([dataset[i] for i in indices])
        if device.type == "cuda":
            sample = utils.move_to_cuda(sample)
        inputs = {
            name: sample["net_input"][name]
            for name in ("src_tokens", "src_lengths", "prev_output_tokens")
        }
        model(**inputs, features_only=True)  # nobody needs the distribution over the vocabulary
        if progress is not None:
            progress.update(len(indices))
