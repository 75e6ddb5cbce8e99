"""``smoe_translation``: many-to-many translation, per-direction scores, routing statistics."""

import json
from contextlib import contextmanager
from copy import copy
from functools import cached_property

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from fairseq_smoe.checkpoints.data_record import DataRecord
from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole
from fairseq_smoe.translation import language_options, validation_bleu
from fairseq_smoe.translation.capacity_meter import CapacityMeter
from fairseq_smoe.translation.contrast import (
    ContrastModel,
    check_contrast,
    contrast,
    with_forced,
)
from fairseq_smoe.translation.contrast_options import ContrastOptions, add_contrast_options
from fairseq_smoe.translation.data_manager import DirectionDataManager, check_training_files
from fairseq_smoe.translation.empty_sources import translate_sentences
from fairseq_smoe.translation.language_tokens import LanguageTokens
from fairseq_smoe.translation.languages import complete_languages
from fairseq_smoe.translation.last_batch import with_the_last_batch
from fairseq_smoe.translation.layers import expert_layers
from fairseq_smoe.translation.memory import keep_freed_memory
from fairseq_smoe.translation.option_values import python_dictionary
from fairseq_smoe.translation.own_modules import MODULES_HELP
from fairseq_smoe.translation.too_long import TooLong


@register_task("smoe_translation")
class SMoETranslationTask(TranslationMultiSimpleEpochTask):
    """Many-to-many translation on top of ``translation_multi_simple_epoch``.

    By default the target language's token is put in front of the source (paper, section 4.3) and
    of the target, and directions are sampled with temperature 1, i.e. by size. Without
    --lang-pairs, both directions of all pairs in the data folder are trained. Without --langs and
    --lang-dict, the languages are read from ``langs.txt`` in the data folder, so that training and
    translation agree on the vocabulary.
    """

    @staticmethod
    def add_args(parser):
        TranslationMultiSimpleEpochTask.add_args(parser)
        for action in parser._actions:
            if action.dest in ("extra_data", "extra_lang_pairs", "langtoks", "sampling_weights"):
                action.type = python_dictionary  # fairseq's executes any code
            if action.dest in ("left_pad_source", "left_pad_target"):
                action.choices = ("True", "False")
        parser.set_defaults(
            sampling_method="temperature",
            sampling_temperature=1.0,
            # not given: as in the checkpoint
            **dict.fromkeys(language_options.DEFAULTS),
        )
        parser.add_argument(
            "--no-decoder-langtok",
            dest="decoder_langtok",
            action="store_false",
            help="put no language token in front of the target",
        )
        parser.add_argument(
            "--distributed-timeout",
            type=int,
            default=600,
            metavar="SECONDS",
            help="how long a process waits for another before the training ends with an error that "
            "names the lost processes (default: %(default)s)",
        )
        parser.add_argument("--moe-modules", metavar="MODULE,...", help=MODULES_HELP)
        parser.add_argument(
            "--restore-fallback",
            action="store_true",
            help="if the checkpoint to resume from is damaged, resume from the newest intact one "
            "in its folder",
        )
        parser.add_argument(
            "--requested-capacity-file",
            metavar="FILE",
            help="in generation: write the mean requested capacity of encoder and decoder, and of "
            "each expert layer, to FILE (JSON)",
        )
        validation_bleu.add_arguments(parser)
        add_contrast_options(parser)

    @classmethod
    def check_training_files(cls, args):
        """Check, before anything is built, that every direction of a training has text.

        Raises:
            OptionError: names the direction.
        """
        complete_languages(args)
        check_training_files(args)

    @classmethod
    def setup_task(cls, args, from_checkpoint=False, **kwargs):
        complete_languages(args, from_checkpoint)
        langs, dicts, training = DirectionDataManager.prepare(cls.load_dictionary, args, **kwargs)
        args.langs, args.lang_dict = list(langs), None  # the list itself goes into the checkpoint
        return cls(args, langs, dicts, training)

    def __init__(self, args, langs, dicts, training):
        super().__init__(args, langs, dicts, training)
        self.data_manager = DirectionDataManager(
            args, self.lang_pairs, langs, dicts, self.sampling_method
        )
        self.too_long = TooLong(self.lang_pairs)
        self.capacity_meter = None
        self.validation_bleu = None
        self.gathered_experts = []  # released when training continues after a validation
        if training and (getattr(args, "cpu", False) or not torch.cuda.is_available()):
            keep_freed_memory()
        if training and getattr(args, "eval_bleu", False):
            self.validation_bleu = validation_bleu.ValidationBLEU(
                args, self.lang_pairs, self.target_dictionary, self.data_manager
            )

    def state_dict(self):
        return {**super().state_dict(), **self._data_record().to_task_state()}

    def load_state_dict(self, state_dict):
        """As fairseq's, for a checkpoint that is going to be used with this task's data.

        Raises:
            CheckpointError: its dictionary, languages or language tokens are others.
        """
        self._check_record(
            DataRecord.in_task_state(state_dict) or DataRecord(None, None, {}),
            getattr(self.args, "path", None) or "the checkpoint",
        )
        super().load_state_dict(state_dict)

    def check_checkpoint(self, path):
        """The same, before a training loads the checkpoint at ``path``."""
        record, _ = language_options.read_record(path)
        if record is not None:
            self._check_record(record, path)

    def _check_record(self, record, checkpoint):
        record.check(self._data_record(), checkpoint, self.args.data)

    def _data_record(self):
        return language_options.record_of(self.args, self.langs, self.dicts)

    def get_batch_iterator(
        self,
        dataset,
        max_tokens=None,
        *args,
        max_positions=None,
        skip_remainder_batch=False,
        grouped_shuffling=False,
        **kwargs,
    ):
        if self.training:  # fairseq does this for training sets only
            max_positions = utils.resolve_max_positions(max_positions, max_tokens)
        make = with_the_last_batch(super().get_batch_iterator)
        iterator = make(dataset, max_tokens, *args, max_positions=max_positions, **kwargs)
        # fairseq's multilingual task does not pass these two options on
        iterator.skip_remainder_batch = skip_remainder_batch
        iterator.grouped_shuffling = grouped_shuffling
        return iterator

    def create_batch_sampler_func(self, *args, **kwargs):
        return with_the_last_batch(super().create_batch_sampler_func(*args, **kwargs))

    def filter_indices_by_size(self, indices, dataset, max_positions=None, *args, **kwargs):
        if not (self.training and isinstance(max_positions, tuple)):
            return super().filter_indices_by_size(indices, dataset, max_positions, *args, **kwargs)
        split = next((name for name, d in self.datasets.items() if d is dataset), "data")
        return self.too_long.leave_out(indices, dataset, split, max_positions)

    def build_model(self, args, from_checkpoint=False):
        # to translate or to validate a checkpoint, processes do not keep step, so experts cannot be
        # sharded
        self.trains_in_step = not from_checkpoint
        return super().build_model(args, from_checkpoint)

    def train_step(self, sample, model, *args, **kwargs):
        while self.gathered_experts:
            self.gathered_experts.pop().release()
        # fairseq would skip the batch; then the ranks would not even add up the same statistics
        in_step = dist.is_initialized() and dist.get_world_size() > 1
        with _name_out_of_memory(f"--max-tokens {self.args.max_tokens}", in_step):
            return super().train_step(sample, model, *args, **kwargs)

    def begin_valid_epoch(self, epoch, model):
        super().begin_valid_epoch(epoch, model)
        if self.validation_bleu is not None:
            # ranks need different numbers of steps to translate their sentences
            for block in _routed_blocks(model):
                block.experts.gather()
                self.gathered_experts.append(block.experts)

    def valid_step(self, sample, model, criterion):
        # fairseq would try the batch again
        in_step = any(block.experts.exchanges for block in _routed_blocks(model))
        with _name_out_of_memory("--max-tokens-valid", in_step):
            loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        if self.validation_bleu is not None:
            statistics = self.validation_bleu.statistics(sample, model)
            logging_output[validation_bleu.STATISTICS] = statistics
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs, criterion):
        super().reduce_metrics(logging_outputs, criterion)
        if self.validation_bleu is not None:
            self.validation_bleu.log(logging_outputs)

    def build_dataset_for_inference(self, src_tokens, src_lengths, constraints=None):
        dataset = super().build_dataset_for_inference(src_tokens, src_lengths)
        dataset.constraints = constraints  # as fairseq's task translation does
        if self.language_tokens.in_source:
            dataset.sizes = dataset.src_sizes = dataset.src.sizes  # with the language token
        return dataset

    def build_generator(
        self,
        models,
        args,
        seq_gen_cls=None,
        extra_gen_cls_kwargs=None,
        prefix_allowed_tokens_fn=None,
    ):
        if self.args.target_lang is None:
            raise OptionError("--target-lang: give --source-lang and --target-lang to translate")
        if getattr(args, "constraints", None) and self.language_tokens.replacing:
            raise OptionError(
                f"--constraints {args.constraints}: not possible for a model that was trained with "
                "--lang-tok-replacing-bos-eos; leave it out"
            )
        contrasting = ContrastOptions.of(args, self.args)
        check_contrast(contrasting, models, args)
        if self.capacity_meter is None:  # its hooks stay on the models
            self.capacity_meter = self.make_capacity_meter(models)
        if prefix_allowed_tokens_fn is not None:  # the parent takes it from here only
            args = copy(args)
            args.prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        generator = super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs)
        self.language_tokens.prepare(generator)
        if getattr(self.args, "keep_inference_langtok", False):
            generator.symbols_to_strip_from_output = {generator.eos}
        if contrasting.on:
            seed = getattr(args, "seed", None) or getattr(self.args, "seed", None)
            contrast(generator, models[0], contrasting, seed or 1)
        return generator

    def make_capacity_meter(self, models):
        """Of the models that translate."""
        return CapacityMeter(models)

    @cached_property
    def language_tokens(self):
        """:class:`LanguageTokens` of the direction to translate."""
        return LanguageTokens(self.args, self.langs, self.data_manager)

    def inference_step(self, generator, models, sample, prefix_tokens=None, constraints=None):
        """Translate a batch.

        Args:
            prefix_tokens: (B, P) words that the translations begin with, without a language token;
                or None.

        Returns:
            hypotheses of every sentence, as :class:`fairseq.sequence_generator.SequenceGenerator`
            makes them. Their tokens begin with the language token. Those of a source without words
            are empty.
        """

        def translate(batch):
            sample, forced = batch["sample"], (batch["prefix"], batch["constraints"])
            if isinstance(getattr(generator, "model", None), ContrastModel):
                sample = with_forced(sample, *forced, generator.pad)
            return super(SMoETranslationTask, self).inference_step(
                generator, models, sample, *forced
            )

        prefix = self.language_tokens.before(prefix_tokens, sample)
        batch = {"sample": sample, "prefix": prefix, "constraints": constraints}
        if hasattr(generator, "beam_size"):
            has_words = sample["net_input"]["src_lengths"] > 1 + self.language_tokens.in_source
            eos, size = generator.eos, generator.beam_size
            hypotheses = translate_sentences(translate, batch, has_words, eos, size)
        else:
            hypotheses = translate(batch)  # scores references
        self._report_capacity(len(hypotheses))
        return hypotheses

    def _report_capacity(self, num_sentences):
        meter, path = self.capacity_meter, getattr(self.args, "requested_capacity_file", None)
        meter.sentences += num_sentences
        if path:
            # rewritten after every batch: fairseq does not tell a task which batch is the last
            facts = {"direction": self.lang_pairs[0], **meter.summary()}
            write_whole(path, json.dumps(facts, indent=1))


@contextmanager
def _name_out_of_memory(option, in_step):
    """End the training if memory runs out while other ranks wait for this one's next step.

    Raises:
        OptionError: names ``option``.
    """
    try:
        yield
    except RuntimeError as error:
        if not (in_step and "out of memory" in str(error)):
            raise
        raise OptionError(
            f"{option}: rank {dist.get_rank()} is out of memory, and the others wait for it; give "
            "a lower number"
        ) from error


def _routed_blocks(model):
    return [layer.routed_block for _, layer in expert_layers(model)]
