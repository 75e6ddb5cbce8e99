"""A loaded model that translates one direction after another."""

import time
from argparse import Namespace
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial

import torch
from fairseq import utils

from fairseq_smoe.evaluation.folder import say
from fairseq_smoe.evaluation.lean_beam import make_lean
from fairseq_smoe.evaluation.parts import Part
from fairseq_smoe.evaluation.reordered import can_reorder, reorder
from fairseq_smoe.translation.capacity_meter import CapacityMeter
from fairseq_smoe.translation.contrast import ContrastModel
from fairseq_smoe.translation.contrast_options import ContrastOptions
from fairseq_smoe.translation.shortened import ShortenedDataset, describe_long, first_few
from fairseq_smoe.translation.task import SMoETranslationTask


@dataclass(frozen=True)
class Settings:
    """Settings of the search; names and meanings are those of fairseq-generate.

    Attributes:
        contrast: :class:`~fairseq_smoe.translation.contrast_options.ContrastOptions`
        seed: of random draws of experts.
    """

    beam: int = 5
    lenpen: float = 1.0
    max_len_a: float = 0.0
    max_len_b: int = 200
    fp16: bool = False
    contrast: ContrastOptions = field(default_factory=ContrastOptions)
    seed: int = 1

    @classmethod
    def of(cls, args):
        """From the options of the command."""
        names = [f.name for f in fields(cls) if f.name != "contrast"]
        return cls(
            **{name: getattr(args, name) for name in names}, contrast=ContrastOptions.of(args)
        )

    def namespace(self):
        """As fairseq has options."""
        return Namespace(**{**vars(self), **vars(self.contrast)})

    def recorded(self):
        """``{name: value}`` of what translations depend on."""
        settings = {**asdict(self), **self.contrast.given()}
        del settings["contrast"]
        if not (self.contrast.on and self.contrast.rank() is None):
            del settings["seed"]
        return settings


@dataclass(frozen=True)
class Translation:
    """A translated test set, in its order.

    Attributes:
        hypotheses: best translation of every sentence, pieces joined by spaces.
        references, sources: the binarised text in the same form.
        requested_capacity: mean passes per token: ``{"encoder", "decoder", "layers"}``; None for a
            dense model.
        seconds: of translating.
    """

    hypotheses: list
    references: list
    sources: list
    requested_capacity: dict
    seconds: float


class DirectionTask(SMoETranslationTask):
    """One direction of a task for many directions; shares the task's dictionaries.

    Args:
        task: the task of all directions.
        direction: ``"en-de"``
        meter: counts requested capacity. A new meter per generator would leave its hooks on the
            model.
    """

    def __init__(self, task, direction, meter):
        args = copy(task.args)
        args.source_lang, args.target_lang = direction.split("-")
        args.requested_capacity_file = None
        super().__init__(args, task.langs, task.dicts, training=False)
        self.meter = meter

    def make_capacity_meter(self, models):
        return self.meter

    def build_generator(self, models, args, **kwargs):
        generator = super().build_generator(models, args, **kwargs)
        if isinstance(generator.model, ContrastModel):  # is lean by itself
            generator.model.with_attention = False
        else:
            make_lean(generator, models)
        return generator.eval()


class DirectionMeter(CapacityMeter):
    """A capacity meter that can be reset for every direction."""

    def start(self):
        self.restore({name: [0, 0] for name in self.layers})
        self.sentences = 0

    def snapshot(self):
        return {name: [int(number) for number in sums] for name, sums in self.layers.items()}

    def add(self, snapshot):
        """Count what was counted elsewhere."""
        for name, sums in self.layers.items():
            sums[:] = [ours + theirs for ours, theirs in zip(sums, snapshot[name], strict=True)]

    def restore(self, snapshot):
        for name, sums in self.layers.items():
            sums[:] = snapshot[name]


@dataclass(frozen=True)
class OpenTestSet:
    """The test set of one direction, whose overlong sentences are cut.

    Attributes:
        task: a :class:`DirectionTask`.
        dataset: a :class:`~fairseq_smoe.translation.shortened.ShortenedDataset`.
        direction, subset: ``"en-de"``, ``"test"``
        make_generator: returns the generator.
    """

    task: DirectionTask
    dataset: ShortenedDataset
    direction: str
    subset: str
    make_generator: Callable

    @cached_property
    def generator(self):
        """Made when the first sentences are translated."""
        return self.make_generator()

    @cached_property
    def sizes(self):
        """Source tokens of every sentence."""
        return self.dataset.sizes[:, 0].tolist()

    def warn(self):
        """Name sentences that are cut."""
        cut = self.dataset.shortened()
        if len(cut):
            where = f"{self.subset} {self.direction}, line {first_few(cut + 1)}"
            say(f"warning: {describe_long(where, self.dataset.longest)}")


class Translator:
    """A model on its device.

    Args:
        model: on the CPU, ready for inference.
        task: the :class:`SMoETranslationTask` of all directions.
        settings: :class:`Settings`
        device: a ``torch.device``
        budget: a :class:`~fairseq_smoe.evaluation.batches.TokenBudget`
    """

    def __init__(self, model, task, settings, device, budget):
        if settings.fp16:
            model = model.half()
        elif can_reorder(device):
            reorder(model)
        self.model = model.to(device)
        self.task = task
        self.settings = settings
        self.device = device
        self.budget = budget
        self.meter = DirectionMeter([self.model])

    def translate(self, direction, subset, progress):
        """Translate the test set of one direction.

        Args:
            direction: ``"en-de"``
            subset: as in fairseq's --gen-subset.
            progress: called with a number of sentences when that many more are translated.

        Returns:
            :class:`Translation`

        Raises:
            OptionError: a sentence does not fit into memory.
        """
        test_set = self.open(direction, subset)
        test_set.warn()
        part = self.translate_some(test_set, range(len(test_set.sizes)), progress)
        return self.join(test_set, [part])

    def open(self, direction, subset):
        """The :class:`OpenTestSet` of one direction."""
        task = DirectionTask(self.task, direction, self.meter)
        task.load_dataset(subset)
        longest = min(self.task.max_positions()[0], self.model.max_positions()[0])
        dataset = ShortenedDataset(task.dataset(subset), longest)
        make_generator = partial(task.build_generator, [self.model], self.settings.namespace())
        return OpenTestSet(task, dataset, direction, subset, make_generator)

    def translate_some(self, test_set, indices, progress):
        """Translate some sentences of a test set.

        Returns:
            :class:`~fairseq_smoe.evaluation.parts.Part`

        Raises:
            OptionError: a sentence does not fit into memory.
        """
        task = test_set.task
        generator = test_set.generator
        ignored = generator.symbols_to_strip_from_output
        hypotheses = {}
        self.meter.start()

        def translate_batch(batch):
            counted = self.meter.snapshot()
            try:
                sentences = [indices[i] for i in batch]
                best = self._search(task, generator, test_set.dataset, sentences)
            except torch.OutOfMemoryError:
                self.meter.restore(counted)
                raise
            for i, tokens in best:
                hypotheses[i] = _pieces(task.target_dictionary, tokens, ignored)
            progress(len(batch))

        started = time.perf_counter()
        self.budget.for_each_batch([test_set.sizes[i] for i in indices], translate_batch)
        seconds = time.perf_counter() - started
        return Part(list(indices), [hypotheses[i] for i in indices], self.meter.snapshot(), seconds)

    def join(self, test_set, parts):
        """The :class:`Translation` of a test set, of parts that have all its sentences."""
        task, dataset = test_set.task, test_set.dataset
        hypotheses = {}
        self.meter.start()
        for part in parts:
            hypotheses.update(zip(part.indices, part.hypotheses, strict=True))
            self.meter.add(part.passes)
        samples = [dataset[i] for i in range(len(dataset))]
        special = self._language_tokens(task)
        capacity = self.meter.summary()
        del capacity["sentences"]
        return Translation(
            [hypotheses[i] for i in range(len(dataset))],
            [_pieces(task.target_dictionary, sample["target"], special) for sample in samples],
            [_pieces(task.source_dictionary, sample["source"], special) for sample in samples],
            capacity,
            sum(part.seconds for part in parts),
        )

    def _search(self, task, generator, dataset, batch):
        """``[(index of the sentence, tokens of its best translation), ...]``"""
        sample = dataset.collater([dataset[i] for i in batch])
        sample = utils.apply_to_sample(lambda tensor: tensor.to(self.device), sample)
        with torch.inference_mode():
            found = task.inference_step(generator, [self.model], sample)
            return [
                (i, hypotheses[0]["tokens"].cpu())
                for i, hypotheses in zip(sample["id"].tolist(), found)
            ]

    def _language_tokens(self, task):
        """The language tokens that the task has put in front of the sentences."""
        tokens = set()
        manager, (source, target) = task.data_manager, task.args.langtoks["main"]
        if source:
            languages = task.args.source_lang, task.args.target_lang
            tokens.add(manager.get_encoder_langtok(*languages, source))
        if target:
            tokens.add(manager.get_decoder_langtok(task.args.target_lang, target))
        return tokens


def _pieces(dictionary, tokens, ignored):
    """Pieces joined by spaces; ``tokens`` as a list, since fairseq looks at every single one."""
    return dictionary.string(tokens.tolist(), extra_symbols_to_ignore=ignored)
