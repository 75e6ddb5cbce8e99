"""Batches as large as memory allows."""

import torch

from fairseq_smoe.errors import OptionError


def in_batches(sizes, tokens):
    """Batches of similar length, the longest sentences first.

    Args:
        sizes: source tokens of every sentence.
        tokens: of a batch at most, padding included; a longer sentence is a batch of its own.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    done = 0
    while done < len(order):
        batch = _batch_from(done, order, sizes, tokens)
        yield batch
        done += len(batch)


def _batch_from(done, order, sizes, tokens):
    return order[done : done + max(1, tokens // sizes[order[done]])]


class TokenBudget:
    """Size of batches: source tokens, padding included.

    Attributes:
        tokens: the size; halved for good when a batch does not fit into the GPU's memory.
    """

    def __init__(self, tokens):
        self.tokens = tokens

    def for_each_batch(self, sizes, process):
        """Call ``process(indices)`` with batches of similar length, the longest sentences first.

        Args:
            sizes: source tokens of every sentence.
            process: raises ``torch.OutOfMemoryError`` when the batch is too large; it is then
                called again with the first half.

        Raises:
            OptionError: a single sentence is too large.
        """
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        done = 0
        while done < len(order):
            longest = sizes[order[done]]
            batch = _batch_from(done, order, sizes, self.tokens)
            try:
                process(batch)
                done += len(batch)
                continue
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise OptionError(
                        f"a sentence of {longest} tokens does not fit into the GPU's memory; "
                        "lower --beam, give --fp16, or --cpu"
                    ) from None
            # the failed batch is only freed here, behind the except block
            torch.cuda.empty_cache()
            self.tokens = longest * (len(batch) // 2)
