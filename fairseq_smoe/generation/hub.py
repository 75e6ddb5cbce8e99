"""fairseq's hub interface, ``SMoETransformer.from_pretrained``, for many-to-many translation."""

from copy import copy
from functools import wraps

import torch
from fairseq import tasks, utils
from fairseq.data import LanguagePairDataset, ListDataset
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.tasks.fairseq_task import FairseqTask

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.batches import fit_batches
from fairseq_smoe.generation.warn import warn
from fairseq_smoe.translation.contrast_options import ContrastOptions
from fairseq_smoe.translation.shortened import describe_long, first_few
from fairseq_smoe.translation.task import SMoETranslationTask


class TranslationHub(GeneratorHubInterface):
    """A loaded model and the direction in which it translates, in plain text.

    ``encode``, ``decode``, ``translate``, ``sample`` and ``generate`` are fairseq's. The target
    language's token is not theirs to see: ``generate`` forces and removes it.
    """

    def __init__(self, cfg, task, models):
        super().__init__(cfg, task, models)
        fit_batches(task, _warn_of_shortened)

    def direction(self, source_lang, target_lang):
        """The same model, with the same parameters in memory, for another direction."""
        args = copy(self.task.args)
        args.source_lang, args.target_lang = source_lang, target_lang
        return type(self)(self.cfg, tasks.setup_task(args), list(self.models))

    def generate(self, tokenized_sentences, *args, prefix_allowed_tokens_fn=None, **kwargs):
        """Hypotheses of each sentence, best first, as fairseq's; without the language token, whose
        probability is in ``score`` alone.

        Args:
            prefix_allowed_tokens_fn: sees no language token either.
        """
        if torch.is_tensor(tokenized_sentences) and tokenized_sentences.dim() == 1:
            sentences, batched = tokenized_sentences.unsqueeze(0), False
        else:
            sentences, batched = tokenized_sentences, True
        if prefix_allowed_tokens_fn is not None and self.task.language_tokens.target is not None:
            prefix_allowed_tokens_fn = self._after_language_token(prefix_allowed_tokens_fn)
        found = super().generate(
            sentences, *args, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, **kwargs
        )
        found = [[self._without_language_token(h) for h in hypotheses] for hypotheses in found]
        return found if batched else found[0]

    def score(self, sentences, translations):
        """Score translations that are given.

        Args:
            sentences: plain text, a string or a list.
            translations: as many, of the same kind.

        Returns:
            for each sentence ``{"tokens", "positional_scores", "score", ...}``: the tokens of the
            translation with the end of sentence, (T,) int64; their log-probabilities, (T,), in
            nats; and the mean of these.
        """
        if isinstance(sentences, str):
            return self.score([sentences], [translations])[0]
        if len(sentences) != len(translations):
            raise OptionError(
                f"{len(sentences)} sentences and {len(translations)} translations: give as many"
            )
        if ContrastOptions.of(self.task.args).on:
            raise OptionError("score: is not possible with scmoe_beta; load the model without it")
        generation = copy(self.cfg.generation)
        generation.score_reference = True
        scorer = FairseqTask.build_generator(self.task, self.models, generation)
        scores = {}
        for batch in self._pairs(sentences, translations):
            batch = utils.apply_to_sample(lambda tensor: tensor.to(self.device), batch)
            for i, (scored,) in zip(batch["id"].tolist(), scorer.generate(self.models, batch)):
                scored = self._without_language_token(scored)
                scored["score"] = scored["positional_scores"].mean()
                scores[i] = scored
        return [scores[i] for i in range(len(sentences))]

    def _pairs(self, sentences, translations):
        """Batches of sentences with their translations, both with language tokens."""
        args, manager = self.task.args, self.task.data_manager
        if args.lang_tok_replacing_bos_eos:
            raise OptionError("score: not possible for --lang-tok-replacing-bos-eos")
        languages, specs = (args.source_lang, args.target_lang), args.langtoks["main"]
        sides = []
        for texts, dictionary, add_token, spec in (
            (sentences, self.src_dict, manager.src_dataset_tranform_func, specs[0]),
            (translations, self.tgt_dict, manager.tgt_dataset_tranform_func, specs[1]),
        ):
            pieces = [self.apply_bpe(self.tokenize(text)) for text in texts]
            tokens = [dictionary.encode_line(p, add_if_not_exist=False).long() for p in pieces]
            texts = add_token(*languages, ListDataset(tokens, list(map(len, tokens))), spec)
            sides += [texts, texts.sizes, dictionary]
        return self.task.get_batch_iterator(
            dataset=LanguagePairDataset(*sides),
            max_tokens=self.cfg.dataset.max_tokens,
            max_sentences=self.cfg.dataset.batch_size,
            max_positions=self.max_positions,
            disable_iterator_cache=True,
        ).next_epoch_itr(shuffle=False)

    def string(self, tokens):
        """The words of a translation; also without language tokens that a model has put there."""
        return self.tgt_dict.string(
            tokens, extra_symbols_to_ignore=self.task.language_tokens.all_targets
        )

    def _without_language_token(self, hypothesis):
        tokens, language_token = hypothesis["tokens"], self.task.language_tokens.target
        if language_token is None or tokens[0] != language_token:
            return hypothesis
        scores = hypothesis["positional_scores"][1:]
        return {**hypothesis, "tokens": tokens[1:], "positional_scores": scores}

    def _after_language_token(self, allowed):
        def allowed_after(sentence, prefix):
            if len(prefix) == 1:  # the token itself, which the search forces
                return list(range(len(self.tgt_dict)))
            return allowed(sentence, torch.cat([prefix[:1], prefix[2:]]))

        return allowed_after


def _warn_of_shortened(dataset, limits):
    cut = dataset.shortened()
    if len(cut):
        warn(describe_long(f"sentence {first_few(cut + 1)}", limits[0]))


def use_for_our_task():
    """``from_pretrained`` of fairseq's models, which may load those of this task, too, always makes
    a ``GeneratorHubInterface``."""
    stock = GeneratorHubInterface.__new__

    @wraps(stock)
    def new(cls, cfg=None, task=None, *args, **kwargs):
        ours = cls is GeneratorHubInterface and isinstance(task, SMoETranslationTask)
        return object.__new__(TranslationHub if ours else cls)

    GeneratorHubInterface.__new__ = new
