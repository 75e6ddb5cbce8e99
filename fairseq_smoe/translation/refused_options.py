"""fairseq's options that do not work with this project's task, and what to do instead.

docs/fairseq-options.md lists all options.
"""

from dataclasses import fields

from fairseq.criterions import CRITERION_REGISTRY

from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.contrast_options import ContrastOptions
from fairseq_smoe.translation.option_values import check_choices, check_data, check_search, flag

TASK = "smoe_translation"

NO_LANGUAGE_MODEL = "a language model of fairseq's has no language tokens; leave it out"
NOT_AUTOREGRESSIVE = "is for models that translate in iterations; leave it out"
SPEECH = "is for speech; leave it out"
ADAPTIVE = "the gates are not trained by adaptive_loss, which this needs; leave it out"
BASE_LAYER = "is another mixture of experts; use --smoe-strata"
XFORMERS = "attention is that of torch; leave it out"
PRUNING = "layers cannot be pruned, since every Nth has experts; train fewer with --{}-layers"
PRECISION = "models translate in 32 bits, or with --fp16 in 16; leave it out"
ONLY_TRANSLATING = "is for commands that translate; leave it out"
ONLY_GENERATE = "fairseq-interactive does not have it; use fairseq-generate"

# by the program that has parsed it: {name: why, and what to do}
EVERYWHERE = {
    "enable_lang_ids": "the model reads language tokens, not numbers; leave it out",
    "enable_reservsed_directions_shared_datasets": "one direction of a pair would get the language "
    "tokens of the other; leave it out, both read the same files anyway",
    "model_parallel_size": "the model is not split like this; shard its experts with "
    "--moe-expert-parallel-size",
    "data_buffer_size": "batches are read ahead by --num-workers alone; leave it out",
    "quantization_config_path": "experts cannot be quantised; leave it out",
}
TRAINING = {
    "adaptive_input": ADAPTIVE,
    "adaptive_softmax_cutoff": ADAPTIVE,
    "adaptive_softmax_dropout": ADAPTIVE,
    "adaptive_softmax_factor": ADAPTIVE,
    "tie_adaptive_weights": ADAPTIVE,
    "tie_adaptive_proj": ADAPTIVE,
    "base_layers": BASE_LAYER,
    "base_sublayers": BASE_LAYER,
    "base_shuffle": BASE_LAYER,
    "encoder_layers_to_keep": PRUNING.format("encoder"),
    "decoder_layers_to_keep": PRUNING.format("decoder"),
    "encoder_xformers_att_config": XFORMERS,
    "decoder_xformers_att_config": XFORMERS,
    "char_inputs": "the model reads pieces of the vocabulary; leave it out",
}
# criterions of fairseq's that this task has everything for
CRITERIONS = (
    "cross_entropy",
    "label_smoothed_cross_entropy",
    "label_smoothed_cross_entropy_with_alignment",
    "label_smoothed_cross_entropy_with_rdrop",
)
TRANSLATING = {
    "lm_path": NO_LANGUAGE_MODEL,
    "lm_weight": NO_LANGUAGE_MODEL,
    "print_step": NOT_AUTOREGRESSIVE,
    "retain_iter_history": NOT_AUTOREGRESSIVE,
    "iter_decode_eos_penalty": NOT_AUTOREGRESSIVE,
    "iter_decode_max_iter": NOT_AUTOREGRESSIVE,
    "iter_decode_force_max_iter": NOT_AUTOREGRESSIVE,
    "iter_decode_with_beam": NOT_AUTOREGRESSIVE,
    "iter_decode_with_external_reranker": NOT_AUTOREGRESSIVE,
    "decoding_format": NOT_AUTOREGRESSIVE,
    "beam_mt": SPEECH,
    "max_len_a_mt": SPEECH,
    "max_len_b_mt": SPEECH,
    "lenpen_mt": SPEECH,
    "eos_token": SPEECH,
    "memory_efficient_bf16": PRECISION,
    "bf16": PRECISION,
    "amp": PRECISION,
    "checkpoint_shard_count": "a checkpoint in parts is found by the name of the whole; leave it "
    "out",
    "distributed_world_size": "translate parts with --num-shards and --shard-id",
    "distributed_rank": "translate parts with --num-shards and --shard-id",
}
GENERATE = {
    "constraints": "data folders have no constraints; use fairseq-interactive, where they follow "
    "the sentence, separated by tabs",
}
INTERACTIVE = {
    "prefix_size": ONLY_GENERATE,
    "score_reference": ONLY_GENERATE,
    "results_path": "redirect the output, or use fairseq-generate",
    "quiet": ONLY_GENERATE,
    "sacrebleu": ONLY_GENERATE,
    "scoring": ONLY_GENERATE,
    "num_shards": ONLY_GENERATE,
    "shard_id": ONLY_GENERATE,
    "gen_subset": ONLY_GENERATE,
}


def check_parsed(args, default):
    """Refuse options of a command for this project's task.

    Args:
        args: all options of the command, an ``argparse.Namespace``.
        default: function from an option's name to the default of the command's parser.

    Raises:
        OptionError: names the option, its value and the remedy.
    """
    refused = dict(EVERYWHERE)
    if not hasattr(args, "beam"):
        refused |= {f.name: ONLY_TRANSLATING for f in fields(ContrastOptions)}
    if hasattr(args, "max_update"):
        refused |= TRAINING if args.arch.startswith("smoe_") else {}
        check_criterion(args.criterion)
    if hasattr(args, "beam"):
        interactive = hasattr(args, "buffer_size")
        refused |= TRANSLATING | (INTERACTIVE if interactive else GENERATE)
    for name, reason in refused.items():
        value = getattr(args, name, None)
        if value != default(name) and value is not None:
            raise OptionError(f"{flag(name, value)}: {reason}")
    check_choices(args)
    check_data(args)
    if hasattr(args, "beam"):
        check_search(args)
        ContrastOptions.of(args).check()


def check_criterion(name):
    """Refuse fairseq's criterions for other tasks."""
    of_fairseq = CRITERION_REGISTRY[name].__module__.startswith("fairseq.")
    if of_fairseq and name not in CRITERIONS:
        raise OptionError(
            f"--criterion {name}: is for other tasks; give moe_label_smoothed_cross_entropy, which "
            "also trains the gates"
        )
