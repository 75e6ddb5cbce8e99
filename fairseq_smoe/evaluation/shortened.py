"""Cutting sentences that are longer than a model takes."""

import torch


class ShortenedDataset:
    """A fairseq data set whose overlong sources are cut in front of their last token.

    fairseq-generate ends with an error at such a sentence. Here the rest of the test set is
    translated.

    Args:
        dataset: its items have ``source``, (S,) int64 with the end of sentence last.
        longest: tokens of a source at most.
    """

    def __init__(self, dataset, longest):
        self._dataset = dataset
        self._longest = longest

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        item = self._dataset[index]
        source = item["source"]
        if len(source) > self._longest:
            item = {**item, "source": torch.cat([source[: self._longest - 1], source[-1:]])}
        return item

    @property
    def num_shortened(self):
        """Number of sentences that are cut."""
        return sum(int(self._dataset.size(i)[0]) > self._longest for i in range(len(self)))

    def source_sizes(self):
        """Tokens of every source."""
        return [min(int(self._dataset.size(i)[0]), self._longest) for i in range(len(self))]

    def collater(self, samples):
        """A batch, as the data set makes it."""
        return self._dataset.collater(samples)
