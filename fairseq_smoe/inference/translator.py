"""``fairseq_smoe.Translator``: text in, text out."""

import logging
import math
import threading

import torch

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.batches import TokenBudget
from fairseq_smoe.evaluation.defaults import CPU_TOKENS
from fairseq_smoe.inference.capacity import capacity_of
from fairseq_smoe.inference.directions import DirectionTasks, Search
from fairseq_smoe.inference.loading import load_models
from fairseq_smoe.inference.long_text import LONG_TEXT, split_text
from fairseq_smoe.inference.results import Hypothesis, Translated
from fairseq_smoe.inference.text_coder import TextCoder
from fairseq_smoe.translation.layers import expert_layers
from fairseq_smoe.translation.shortened import shorten

logger = logging.getLogger(__name__)


class Translator:
    """Translates lists of strings with a trained model, or several together.

    The translations are those of fairseq-generate with the same options, whatever else is
    translated at the same time. Calls from several threads wait for one another.

    Make one with :meth:`load`.

    Attributes:
        languages: codes of all languages that the model knows.
        directions: ``(source, target)`` of all directions in which it was trained.
        has_experts: whether there are passes to count.
        device: a ``torch.device``.
        spm: path of the SentencePiece model.
    """

    def __init__(self, models, task, spm, directions, device):
        self.spm = spm
        self.languages = list(task.langs)
        self.directions = list(directions)
        self.device = device
        self._models = list(models)
        self.has_experts = bool(expert_layers(models[0]))
        self._tasks = DirectionTasks(task, self._models)
        self._coder = TextCoder(spm, task.source_dictionary)
        self._longest = min(
            task.max_positions()[0], *(model.max_positions()[0] for model in self._models)
        )
        self._warned = set()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path, data=None, device="cpu", threads=None, dtype="float32"):
        """Load a model.

        Args:
            path: a packed model (``python -m fairseq_smoe pack``), a checkpoint, or the folder of a
                training; of a list of these, the models translate together (an ensemble).
            data: folder that ``prepare`` has made, with dictionary and SentencePiece model.
                Default: that of the training, or the folder of the checkpoint.
            device: such as ``"cpu"`` or ``"cuda"``.
            threads: of torch in this process; None leaves torch's number.
            dtype: "float32", "bfloat16", "float16" (GPUs), or "int8" for weights in 8 bits (CPUs).

        Raises:
            OptionError: a file is missing, damaged, or does not fit to another.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        device = torch.device(device)
        loaded = load_models(path, device, data, dtype)
        return cls(loaded.models, loaded.task, loaded.spm, loaded.directions, device)

    def translate(
        self,
        texts,
        source,
        target,
        *,
        beam=5,
        n_best=1,
        lenpen=1.0,
        sampling_topp=None,
        max_len=200,
        max_tokens=CPU_TOKENS,
        long_text="split",
        with_scores=False,
        with_capacity=False,
    ):
        """Translate.

        Args:
            texts: a string, or a list of strings.
            source, target: languages, the same for all texts or a list with one for each.
            beam: beam size.
            n_best: number of translations of each text, at most ``beam``.
            lenpen: above 1 favours longer translations.
            sampling_topp: draw from the smallest set of tokens that have this probability together,
                instead of searching for the best translation.
            max_len: tokens of a translation, at most.
            max_tokens: source tokens of a batch, at most; does not change translations.
            long_text: what to do with a text that is longer than the model takes: "split" it into
                sentences, or "shorten" it as fairseq-generate of this project does, or "refuse".
            with_scores: return scores as well.
            with_capacity: return the passes of each token as well.

        Returns:
            :class:`~fairseq_smoe.inference.results.Translated`, or a list of them. A text without
            words has an empty translation.

        Raises:
            OptionError: a language is unknown, or an option is out of range.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list(texts)
        directions = list(zip(self._each(source, texts), self._each(target, texts), strict=True))
        search = Search(beam, n_best, lenpen, max_len, sampling_topp)
        _check(search, max_tokens, long_text)
        for direction in dict.fromkeys(directions):
            self._check_direction(*direction)
        parts = [
            self._parts(text, language, long_text, i)
            for i, (text, (language, _)) in enumerate(zip(texts, directions))
        ]
        jobs = [(d, part) for d, own in zip(directions, parts) for part in own]
        with_capacity = with_capacity and self.has_experts
        with self._lock, torch.inference_mode():
            found = iter(self._search(jobs, search, max_tokens))
            translated = [
                self._translated(
                    direction, [next(found) for _ in own], own, search, with_scores, with_capacity
                )
                for direction, own in zip(directions, parts)
            ]
        return translated[0] if single else translated

    def _translated(self, direction, found, parts, search, with_scores, with_capacity):
        """The result for a text.

        Args:
            found: fairseq's hypotheses of each of its parts.
        """
        hypotheses = [[self._hypothesis(h, with_scores) for h in own] for own in found]
        joined = tuple(map(_join, zip(*hypotheses))) or (_empty(with_scores),) * search.n_best
        capacity = None
        if with_capacity:
            best = zip(parts, found)
            capacity = tuple(self._capacity(direction, part, own[0]) for part, own in best)
        return Translated(joined[0].text, joined, *direction, capacity)

    def check(self, source, target, **options):
        """Check arguments of :meth:`translate` before there is text.

        Raises:
            OptionError: as :meth:`translate`.
        """
        self.translate([], source, target, **options)
        self._check_direction(source, target)

    def _each(self, language, texts):
        return [language] * len(texts) if isinstance(language, str) else list(language)

    def _check_direction(self, source, target):
        for name, language in (("source", source), ("target", target)):
            if language not in self.languages:
                raise OptionError(
                    f"{name} {language}: the model knows {', '.join(self.languages)}; choose one "
                    "of them"
                )
        if (source, target) not in self.directions and (source, target) not in self._warned:
            self._warned.add((source, target))
            logger.warning(f"{source}-{target}: the model was not trained in this direction")

    def _parts(self, text, language, long_text, index):
        """The parts of a text that are translated by themselves, as tokens."""
        if not text.strip():
            return []
        room = self._longest - 1  # the source's language token
        tokens = self._coder.encode(text, language)
        if len(tokens) <= room:
            return [tokens]
        if long_text == "refuse":
            raise OptionError(
                f"text {index + 1}: has {len(tokens)} tokens, and the model takes {room}; split "
                "it, or give long_text='split'"
            )
        if long_text == "shorten":
            return [shorten(tokens, room)]
        parts = split_text(text, lambda part: len(self._coder.encode(part, language)) <= room)
        return [shorten(self._coder.encode(part, language), room) for part in parts]

    def _search(self, jobs, search, max_tokens):
        """fairseq's hypotheses of each ``((source, target), tokens)``."""
        items = [self._tasks.encode(*job) for job in jobs]
        found = [None] * len(jobs)

        def translate_batch(batch):
            directions = [jobs[i][0] for i in batch]
            hypotheses = self._tasks.search(
                directions, [items[i] for i in batch], search, self.device
            )
            for i, own in zip(batch, hypotheses):
                found[i] = own[: search.n_best]

        groups = {}
        for i, (direction, _) in enumerate(jobs):
            groups.setdefault(None if self._tasks.mixes() else direction, []).append(i)
        for group in groups.values():
            sizes = [len(items[i]["source"]) for i in group]
            TokenBudget(max_tokens).for_each_batch(
                sizes, lambda batch, group=group: translate_batch([group[i] for i in batch])
            )
        return found

    def _hypothesis(self, found, with_scores):
        hidden = self._tasks.target_tokens
        tokens = found["tokens"]
        pieces = self._coder.pieces(tokens, hidden)
        score = piece_scores = None
        if with_scores:
            score = float(found["score"]) / math.log(2)
            own = (found["positional_scores"] / math.log(2)).tolist()
            piece_scores = tuple(s for t, s in zip(tokens.tolist(), own) if t not in hidden)
        return Hypothesis(self._coder.text(pieces), score, tuple(pieces), piece_scores)

    def _capacity(self, direction, tokens, best):
        task = self._tasks.of(*direction)
        source = self._tasks.encode(direction, tokens)["source"]
        self._tasks.set_beam_size(1)
        return capacity_of(self._models[0], source, best["tokens"].cpu(), task, self._coder)


def _empty(with_scores):
    return Hypothesis("", *((0.0, (), ()) if with_scores else (None, (), None)))


def _join(parts):
    """One hypothesis of those of all parts of a text."""
    if len(parts) == 1:
        return parts[0]
    text = " ".join(part.text for part in parts)
    pieces = tuple(piece for part in parts for piece in part.pieces)
    if parts[0].score is None:
        return Hypothesis(text, None, pieces, None)
    scores = tuple(score for part in parts for score in part.piece_scores)
    mean = sum(part.score * len(part.piece_scores) for part in parts) / len(scores)
    return Hypothesis(text, mean, pieces, scores)


def _check(search, max_tokens, long_text):
    for name, value, fits, expected in (
        ("beam", search.beam, search.beam >= 1, "1 or more"),
        ("n_best", search.n_best, 1 <= search.n_best <= search.beam, f"1 to beam ({search.beam})"),
        ("max_len", search.max_len, search.max_len >= 1, "1 or more"),
        ("max_tokens", max_tokens, max_tokens >= 1, "1 or more"),
        ("long_text", long_text, long_text in LONG_TEXT, " or ".join(LONG_TEXT)),
        (
            "sampling_topp",
            search.sampling_topp,
            search.sampling_topp is None or 0 < search.sampling_topp <= 1,
            "above 0, up to 1",
        ),
    ):
        if not fits:
            raise OptionError(f"{name} {value}: expected {expected}")
