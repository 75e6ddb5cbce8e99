"""fairseq-interactive: one line in, one line out."""

from functools import partial, wraps
from pathlib import Path

from fairseq import utils

from fairseq_smoe.generation.batches import fit_batches
from fairseq_smoe.generation.program import changing_task, is_ours, structured, use_utf8
from fairseq_smoe.generation.shown import show_words_alone
from fairseq_smoe.generation.text_lines import TextLines
from fairseq_smoe.generation.warn import warn
from fairseq_smoe.patching import replaced
from fairseq_smoe.translation.shortened import describe_long


def change_interactive(module):
    """Change ``fairseq_cli.interactive`` for this project's task."""
    stock = module.main

    @wraps(stock)
    def main(cfg):
        if not is_ours(cfg):
            return stock(cfg)
        cfg = structured(cfg)
        use_utf8()
        text = Input(cfg)

        def change(task):
            show_words_alone(task)
            fit_batches(task, partial(text.check, task))

        tasks = changing_task(module, change)
        with replaced(module, buffered_read=text.read, tasks=tasks):
            return stock(cfg)

    module.main = main


class Input:
    """The text to translate, about which users are warned."""

    def __init__(self, cfg):
        self._cfg = cfg
        self._lines = None
        self._words = self._unknown = 0
        self._explained = False

    def read(self, path, buffer_size):
        """Lists of lines, as fairseq's ``buffered_read`` yields them."""
        self._lines = TextLines(path)
        return self._lines.buffers(buffer_size)

    def check(self, task, dataset, limits):
        """Warn of lines that are cut, and of text that is not in pieces.

        Args:
            dataset: a ``ShortenedDataset`` of the last lines that were read.
            limits: tokens of source and target at most.
        """
        for i in dataset.shortened():
            where = f"{self._lines.name}, line {self._lines.given + i + 1}"
            warn(describe_long(where, limits[0]))
        if not self._explained:
            self._explain_unknown(task, dataset)

    def _explain_unknown(self, task, dataset):
        unk, not_words = task.source_dictionary.unk(), task.language_tokens.in_source + 1
        for i in range(len(dataset)):
            words = dataset[i]["source"]
            self._unknown += int((words == unk).sum())
            self._words += len(words) - not_words
        if 2 * self._unknown > self._words:
            self._explained = True
            warn(
                f"{self._lines.name}: {self._unknown} of {self._words} tokens so far are not in "
                f"the vocabulary; {self._remedy()}"
            )

    def _remedy(self):
        if getattr(self._cfg.bpe, "_name", None) is not None:
            return "give the model of --bpe that the training data was made with"
        model = Path(utils.split_paths(self._cfg.task.data)[0]) / "spm.model"
        path = model if model.exists() else "FILE"
        return (
            "if the training data is in SentencePiece pieces, give --bpe sentencepiece "
            f"--sentencepiece-model {path}"
        )
