"""Sentences that are longer than a training takes: left out and named."""

import logging
from heapq import nsmallest

import torch.distributed as dist
from fairseq.data import ConcatDataset
from fairseq.data.multilingual.sampled_multi_dataset import SampledMultiDataset

from fairseq_smoe.errors import OptionError

NAMED = 5  # sentences in a message

logger = logging.getLogger(__name__)


class TooLong:
    """Leaves sentences out, and says once which ones.

    fairseq gives the number of such a sentence in its own order of a whole set. In a validation
    set it ends the training with it.

    Args:
        directions: of the task, in its order.
    """

    def __init__(self, directions):
        self._directions = directions
        self._said = set()

    def leave_out(self, indices, dataset, split, max_positions):
        """The indices of sentences that are not longer than ``max_positions``, (source, target).

        Raises:
            OptionError: none is left.
        """
        kept, too_long = dataset.filter_indices_by_size(indices, max_positions)
        if not len(too_long):
            return kept
        source, target = max_positions
        limit = (
            f"longer than {source} source or {target} target tokens (--max-source-positions, "
            "--max-target-positions, --max-tokens or --max-tokens-valid)"
        )
        if not len(kept):
            raise OptionError(f"{split}: all {len(indices)} sentences are {limit}")
        # in the order of the text, which is the same when a training set is drawn anew
        places = nsmallest(NAMED, ((self._place(dataset, index), index) for index in too_long))
        names = [
            f"{direction} sentence {position} ({{}} source, {{}} target tokens)".format(
                *dataset.size(index)
            ).strip()
            for (direction, position), index in places
        ]
        more = f", and {len(too_long) - NAMED} more" if len(too_long) > NAMED else ""
        message = (
            f"{split}: left out {len(too_long)} of {len(indices)} sentences, which are {limit}: "
            f"{', '.join(names)}{more} (sentences of a direction are counted from 0)"
        )
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first and message not in self._said:
            logger.warning(message)
        self._said.add(message)
        return kept

    def _place(self, dataset, index):
        """Direction of a sentence, and its index among those of the direction."""
        if isinstance(dataset, SampledMultiDataset):
            i, position = dataset._get_dataset_and_index(index)
            return dataset.keys[i].partition(":")[2], int(position)
        if isinstance(dataset, ConcatDataset):
            i, position = dataset._get_dataset_and_sample_index(index)
            return self._directions[int(dataset.directions[i])], int(position)
        return "", index
