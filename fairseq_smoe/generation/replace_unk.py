"""--replace-unk: words that are not in the vocabulary are copied from the source.

fairseq's own version asks for a data format that its multilingual tasks cannot read, and takes
pairs of positions for positions.
"""

from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace

import torch

from fairseq_smoe.errors import OptionError
from fairseq_smoe.patching import Overlay, replaced

NO_FILE = "@@ "  # what fairseq's parser makes of --replace-unk without a file


def replace_unknown_words(module, cfg):
    """Apply --replace-unk while a context lasts.

    Args:
        module: the program, fairseq_cli.generate or fairseq_cli.interactive.
        cfg: its options, in which it will not find --replace-unk.
    """
    path = cfg.generation.replace_unk
    if path is None:
        return nullcontext()
    cfg.generation.replace_unk = None
    replacements = {} if path == NO_FILE else read_replacements(path)
    tasks = module.tasks

    def setup_task(*args, **kwargs):
        task = tasks.setup_task(*args, **kwargs)
        UnknownWords(task, replacements).attach()
        return task

    return replaced(module, tasks=Overlay(tasks, SimpleNamespace(setup_task=setup_task)))


def read_replacements(path):
    """``{source word: target word}`` from a file with a pair on each line.

    Raises:
        OptionError: names the file and the line.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            pairs = [line.split() for line in handle]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--replace-unk {path}: cannot be read ({error})") from error
    for number, pair in enumerate(pairs, start=1):
        if len(pair) not in (0, 2):
            raise OptionError(
                f"--replace-unk {path}: line {number} has {len(pair)} words; expected a word of "
                "the source and its translation"
            )
    return dict(pair for pair in pairs if pair)


class UnknownWords:
    """Gives unknown words their spelling.

    The dictionaries get further entries for such words. The model reads the entry for unknown words
    in their place, since it has no embeddings for them.

    Args:
        task: of the program.
        replacements: ``{source word: target word}``; others are copied.
    """

    def __init__(self, task, replacements):
        self._task = task
        self._replacements = replacements
        self._source, self._target = task.source_dictionary, task.target_dictionary
        self._num_known = len(self._source)

    def attach(self):
        """Let the task keep and replace unknown words."""
        task, stock = self._task, self._task.inference_step

        @wraps(stock)
        def inference_step(generator, models, sample, prefix_tokens=None, constraints=None):
            net_input = sample["net_input"]
            src_tokens = net_input["src_tokens"]
            read = src_tokens.masked_fill(src_tokens >= self._num_known, self._source.unk())
            seen = {**sample, "net_input": {**net_input, "src_tokens": read}}
            found = stock(generator, models, seen, prefix_tokens, constraints)
            for source_S, hypotheses in zip(src_tokens, found):
                for hypothesis in hypotheses:
                    self._replace(hypothesis, source_S)
            return found

        task.inference_step = inference_step
        task.get_interactive_tokens_and_lengths = self._encode_lines

    def _encode_lines(self, lines, encode):
        tokens = [self._source.encode_line(encode(line)).long() for line in lines]
        return tokens, [len(t) for t in tokens]

    def _replace(self, hypothesis, source_S):
        """Replace unknown words by the word that got most attention, (S, T), at their position."""
        unknown = (hypothesis["tokens"] == self._target.unk()).nonzero().flatten()
        words_S = ~torch.isin(source_S, self._special().to(source_S))
        if not len(unknown) or not words_S.any():
            return
        attention = hypothesis["attention"][:, unknown].masked_fill(~words_S.unsqueeze(1), -1)
        for position, source in zip(unknown.tolist(), source_S[attention.argmax(0)].tolist()):
            if source != self._source.unk():  # in binarised data, the spelling is lost
                word = self._source[source]
                word = self._replacements.get(word, word)
                hypothesis["tokens"][position] = self._target.add_symbol(word)

    def _special(self):
        args, (spec, _) = self._task.args, self._task.args.langtoks["main"]
        token = self._task.data_manager.get_encoder_langtok(
            args.source_lang, args.target_lang, spec
        )
        special = [self._source.pad(), self._source.eos(), token]
        return torch.tensor([index for index in special if index is not None])
