"""Batches of sentences in several directions."""

from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace

from fairseq import utils

from fairseq_smoe.evaluation.translator import DirectionTask


@dataclass(frozen=True)
class Search:
    """Settings of the search; names and meanings are those of fairseq-generate.

    Attributes:
        max_len: most tokens of a translation (--max-len-b).
        sampling_topp: draw translations from the smallest set of tokens that together have this
            probability; None for beam search.
    """

    beam: int = 5
    n_best: int = 1
    lenpen: float = 1.0
    max_len: int = 200
    sampling_topp: float | None = None

    def namespace(self):
        """As fairseq has options."""
        drawn = self.sampling_topp is not None
        return Namespace(
            beam=self.beam,
            nbest=self.n_best,
            lenpen=self.lenpen,
            max_len_a=0,
            max_len_b=self.max_len,
            sampling=drawn,
            sampling_topk=-1,
            sampling_topp=self.sampling_topp if drawn else -1,
        )


class DirectionTasks:
    """The task of each direction, which adds the tokens of languages, and generators.

    Args:
        task: the :class:`~fairseq_smoe.translation.task.SMoETranslationTask` of all directions.
        models: that translate together.
    """

    def __init__(self, task, models):
        self._task, self._models = task, models
        self._counts_nothing = SimpleNamespace(sentences=0)
        self.of = lru_cache(maxsize=None)(self._of)
        self._generator = lru_cache(maxsize=16)(self._build_generator)

    def _of(self, source, target):
        task = DirectionTask(self._task, f"{source}-{target}", self._counts_nothing)
        task.capacity_meter = task.meter
        return task

    def encode(self, direction, tokens):
        """A sentence as fairseq's data sets have it, with the source's language token.

        Args:
            direction: ``(source, target)``
            tokens: (S,) with the end of the sentence.
        """
        return self.of(*direction).build_dataset_for_inference([tokens], [len(tokens)])[0]

    def mixes(self):
        """Whether sentences of different target languages may be in a batch. Not if the language's
        token takes the place of the beginning of the sentence, of which a search has only one."""
        return not self._task.args.lang_tok_replacing_bos_eos

    def search(self, directions, items, search, device):
        """Hypotheses of each sentence.

        Args:
            directions: ``(source, target)`` of each sentence.
            items: what :meth:`encode` returned for each.
            search: :class:`Search`

        Returns:
            a list of lists of hypotheses, as fairseq's generator makes them.
        """
        first = self.of(*directions[0])
        dataset = first.build_dataset_for_inference([], [])
        sample = dataset.collater([{**item, "id": i} for i, item in enumerate(items)])
        order = sample["id"].tolist()  # by length
        starts = [self.of(*directions[i]).language_tokens.target for i in order]
        if None not in starts:
            sample["first_tokens"] = sample["net_input"]["src_tokens"].new_tensor(starts)
        sample = utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
        generator = self._generator(None if self.mixes() else directions[0], search)
        self.set_beam_size(search.beam)
        found = first.inference_step(generator, self._models, sample)
        return [hypotheses for _, hypotheses in sorted(zip(order, found), key=lambda pair: pair[0])]

    def set_beam_size(self, size):
        """Say how many neighbouring rows share a source; 1 outside of a search."""
        for model in self._models:
            model.decoder.set_beam_size(size)

    def _build_generator(self, direction, search):
        task = self.of(*(direction or self._any_direction()))
        return task.build_generator(self._models, search.namespace())

    @cached_property
    def target_tokens(self):
        """Indices of the tokens of all target languages, which are no words."""
        return self.of(*self._any_direction()).language_tokens.all_targets

    def _any_direction(self):
        pairs = self._task.args.lang_pairs
        return tuple((pairs if isinstance(pairs, list) else pairs.split(","))[0].split("-"))
