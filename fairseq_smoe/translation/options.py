"""Every option of the model, with its help text and its checks, in one place."""

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_config import (
    DecoderConfig,
    EncDecBaseConfig,
    QuantNoiseConfig,
)

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.arrangements.multi_head import num_heads
from fairseq_smoe.moe.block import NORMS
from fairseq_smoe.moe.doors import all_kinds, check_kinds, named_kinds, pool_of
from fairseq_smoe.moe.expert_group import default_group_size
from fairseq_smoe.moe.kind import option
from fairseq_smoe.moe.pass_scale import parse_pass_scale
from fairseq_smoe.moe.strata import format_strata, parse_strata, split_strata
from fairseq_smoe.translation.depth_init import DEPTH_INIT_EXPERTS
from fairseq_smoe.translation.train_only import parse_train_only

DEFAULT_STRATA = "4-4"
GROUPED_MULTIPLE = 8  # 16 bytes of half precision
_WIDTHS = (
    *("encoder_embed_dim", "encoder_ffn_embed_dim", "decoder_embed_dim", "decoder_ffn_embed_dim"),
    "moe_ffn_dim",
)


def _flag(name):
    return "--" + name.replace("_", "-")


@dataclass
class LayerOptions(FairseqDataclass):
    """Options of the expert layers that do not depend on the kind of gates and experts."""

    smoe_strata: Optional[str] = option(
        None,
        "experts of each stratum, first to last, e.g. 4-4-8; a single number is a vanilla MoE "
        f"(default: {DEFAULT_STRATA})",
    )
    moe_expert_count: Optional[int] = option(
        None, "experts of a vanilla MoE: the same as --smoe-strata with a single number"
    )
    moe_freq: int = option(
        2, "every Nth layer of encoder and decoder is an expert layer; 0 for a dense model"
    )
    encoder_moe_freq: Optional[int] = option(None, "overrides --moe-freq in the encoder")
    decoder_moe_freq: Optional[int] = option(None, "overrides --moe-freq in the decoder")
    moe_ffn_dim: Optional[int] = option(
        None, "hidden width of the experts (default: that of a dense FFN, --encoder-ffn-embed-dim)"
    )
    moe_ffn_split: int = option(
        1,
        "experts of finer grain: replace every expert of --smoe-strata by this many, each with "
        "that fraction of the hidden units",
    )
    moe_eom: float = option(
        0.0, "expert output masking: fraction of expert outputs zeroed in training"
    )
    moe_gate: str = option(
        "top-k",
        "gates, which decide which experts a token visits: "
        f"{', '.join(named_kinds('--moe-gate'))}, or module:Class for a gate of your own "
        "(docs/extend.md)",
    )
    moe_gate_bias: bool = option(False, "gates with a bias for each expert, which is 0 at first")
    moe_experts: str = option(
        "ffn",
        f"kind of the experts: {', '.join(named_kinds('--moe-experts'))}, or module:Class for a "
        "kind of your own",
    )
    moe_arrangement: Optional[str] = option(
        None,
        "how an FFN sublayer is built from blocks: "
        f"{', '.join(named_kinds('--moe-arrangement'))} (which also have flags of their own), or "
        "module:Class; several are joined by commas (default: a single block)",
    )
    smoe_norm: str = option(
        "paper",
        "'paper' follows the paper's equations; 'released' computes what the authors' code does",
    )
    smoe_pass_scale: Optional[str] = option(
        None,
        "multiply the output of every pass by a trained number that starts at this: one number, or "
        "one for each stratum, e.g. 1,0 for two (default: no such factors)",
    )
    smoe_pass_curriculum: int = option(
        0,
        "begin the training with a single pass: the chance of a token to go on to another one rises "
        "from 0 to 1 over this many updates (default: 0, none)",
    )
    smoe_depth_init: bool = option(
        False,
        "DS-Init: divide the initial weights of output layers by the root of their depth, to which "
        "every stratum counts as a layer",
    )
    train_only: Optional[str] = option(
        None,
        "train only parameters whose names contain one of these words, separated by commas, e.g. "
        "gates,embed_tokens; embed_tokens[2000:] means the rows from 2000 on (default: train all)",
    )
    untrained_tokens: int = option(
        0,
        "so many tokens at the end of the vocabulary have not been trained, and are never chosen; "
        "set by 'extend' in the checkpoint that it writes",
    )
    untrained_experts: Optional[str] = option(
        None,
        "so many experts at the end of strata have not been trained, and are never chosen, e.g. "
        "2:4 for four of the second stratum; set by 'extend' in the checkpoint that it writes",
    )
    moe_expert_parallel_size: Optional[int] = option(
        None,
        "number of processes over which the experts are sharded; it has to divide the number of "
        "processes and of experts. 1: every process holds all experts (default: the greatest that "
        "divides the number of processes and every stratum)",
    )
    moe_gating_use_fp32: bool = option(
        True, "accepted for old command lines; gates always compute in float32"
    )
    post_norm: bool = option(
        False, "LayerNorm after the residual instead of before the sublayer; dense models only"
    )


def _kind_fields():
    """``{name: field for make_dataclass}`` of all gates, kinds of experts and arrangements.

    Raises:
        OptionError: a class of the user's has an option whose name is taken.
    """
    taken = {f.name: "this model" for f in fields(LayerOptions)}
    taken |= {name: "fairseq's transformer" for name, *_ in _flat_transformer_fields()}
    owners, found = {}, {}
    for kind in all_kinds():
        for f in fields(kind.Options):
            owner = owners.setdefault(f.name, kind.Options)
            if f.name in taken or not issubclass(kind.Options, owner):
                raise OptionError(
                    f"{kind.Options.__module__}:{kind.Options.__name__}: {_flag(f.name)} is an "
                    f"option of {taken.get(f.name, owner.__name__)} already; rename the field"
                )
            made = field(default=f.default, metadata=dict(f.metadata))
            found.setdefault(f.name, (f.name, f.type, made))
    return found


def _flat_transformer_fields():
    """fairseq's TransformerConfig without nesting: ``encoder.layers`` becomes ``encoder_layers``.

    The installed fairseq ignores command-line values of nested model options.
    """
    nested = {
        "encoder": EncDecBaseConfig,
        "decoder": DecoderConfig,
        "quant_noise": QuantNoiseConfig,
    }
    # the decoder follows the encoder's sizes unless told otherwise
    defaults = {
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "share_all_embeddings": True,
        "decoder_embed_dim": None,
        "decoder_ffn_embed_dim": None,
    }
    derived = {"decoder_input_dim", "decoder_output_dim"}
    for outer in fields(TransformerConfig):
        config = nested.get(outer.name)
        for inner in fields(config) if config else [outer]:
            name = f"{outer.name}_{inner.name}" if config else inner.name
            if inner.name == "_name" or name in derived:
                continue
            kind = Optional[int] if name in defaults and defaults[name] is None else inner.type
            if name.endswith("layers_to_keep"):
                kind = Optional[str]  # fairseq's parser fails at its own type
            default = defaults.get(name, inner.default)
            yield name, kind, field(default=default, metadata=dict(inner.metadata))


FlatTransformerOptions = make_dataclass(
    "FlatTransformerOptions", list(_flat_transformer_fields()), bases=(FairseqDataclass,)
)


RoutingOptions = make_dataclass(
    "RoutingOptions", list(_kind_fields().values()), bases=(LayerOptions,)
)


@dataclass
class SMoETransformerOptions(RoutingOptions, FlatTransformerOptions):
    """All options of ``--arch smoe_transformer``."""


def expert_layer_period(options, side):
    """N when every Nth layer of ``side`` ("encoder" or "decoder") is an expert layer, else 0."""
    own = getattr(options, f"{side}_moe_freq")
    return options.moe_freq if own is None else own


def is_expert_layer(options, side, index):
    """Whether layer ``index`` (from 0) of ``side`` is an expert layer."""
    period = expert_layer_period(options, side)
    return period > 0 and (index + 1) % period == 0


def expert_parallel_size(options, strata, num_processes):
    """Number of processes over which the experts are sharded.

    Raises:
        OptionError: --moe-expert-parallel-size does not divide the processes.
    """
    size = options.moe_expert_parallel_size
    if size is None:
        return default_group_size(num_processes, strata)
    if num_processes % size:
        total = sum(strata)
        fitting = [n for n in range(1, total + 1) if num_processes % n == total % n == 0]
        raise OptionError(
            f"--moe-expert-parallel-size {size}: does not divide the {num_processes} processes; "
            f"expected one of {', '.join(map(str, fitting))}"
        )
    return size


def resolve_strata(options):
    """The strata of the model's blocks: those that the options ask for, with the experts of each
    multiplied by ``--moe-ffn-split``.

    Raises:
        OptionError: the layout does not parse or contradicts ``--moe-expert-count``.
    """
    split = getattr(options, "moe_ffn_split", 1)  # not in checkpoints of earlier versions
    if split < 1:
        raise OptionError(f"--moe-ffn-split {split}: expected 1 (none) or more")
    return split_strata(_given_strata(options), split)


def _given_strata(options):
    count = options.moe_expert_count
    if count is not None and count < 1:
        raise OptionError(f"--moe-expert-count {count}: expected 1 or more experts")
    if options.smoe_strata is None:
        return (count,) if count is not None else parse_strata(DEFAULT_STRATA)
    strata = parse_strata(options.smoe_strata)
    if count is not None and count != sum(strata):
        raise OptionError(
            f"--moe-expert-count {count} contradicts --smoe-strata {options.smoe_strata}, "
            f"which has {sum(strata)} experts: drop --moe-expert-count"
        )
    return strata


def check_options(options):
    """Check everything that can be checked before a model is built.

    Returns:
        The strata (at the start, if the gates may add experts), or None for a dense model.

    Raises:
        OptionError: names the flag, the value and what would be right.
    """
    strata = resolve_strata(options)
    check_kinds(options, strata)
    if options.train_only is not None:
        parse_train_only(options.train_only)
    if options.untrained_tokens < 0:
        raise OptionError(f"--untrained-tokens {options.untrained_tokens}: expected 0 or more")
    if options.moefy_dense and _count_expert_layers(options) == _count_layers(options):
        raise OptionError(
            f"--moefy-dense with --moe-freq {options.moe_freq}: there is no dense layer; for the "
            "experts give --moe-experts moefied"
        )
    if options.smoe_norm not in NORMS:
        raise OptionError(f"--smoe-norm {options.smoe_norm}: expected {' or '.join(NORMS)}")
    parse_pass_scale(options.smoe_pass_scale, strata)
    _check_pass_curriculum(options, strata)
    if options.smoe_depth_init and options.moe_experts not in DEPTH_INIT_EXPERTS:
        raise OptionError(
            f"--smoe-depth-init with --moe-experts {options.moe_experts}: expected "
            f"{' or '.join(DEPTH_INIT_EXPERTS)}; drop --smoe-depth-init"
        )
    if options.moe_ffn_dim is not None and options.moe_ffn_dim < 1:
        raise OptionError(f"--moe-ffn-dim {options.moe_ffn_dim}: expected 1 or more")
    if not 0 <= options.moe_eom < 1:
        raise OptionError(
            f"--moe-eom {options.moe_eom}: expected a fraction from 0 up to, but not, 1"
        )
    if options.moe_expert_backend == "grouped_mm":
        for name in _WIDTHS:
            value = getattr(options, name)
            multiple = GROUPED_MULTIPLE
            multiple *= options.moe_ffn_split if "ffn" in name else num_heads(options)
            if value is not None and value % multiple:
                raise OptionError(
                    f"--moe-expert-backend grouped_mm with {_flag(name)} {value}: expected a "
                    f"multiple of {multiple}, or another backend"
                )
    size, pool = options.moe_expert_parallel_size, pool_of(options, strata)
    if size is not None and (size < 1 or sum(pool) % size):
        most = "" if pool == strata else f" with --moe-max-experts {options.moe_max_experts}"
        raise OptionError(
            f"--moe-expert-parallel-size {size}: expected a divisor of the {sum(pool)} experts of "
            f"--smoe-strata {format_strata(strata)}{most}"
        )
    for name in ("moe_freq", "encoder_moe_freq", "decoder_moe_freq"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise OptionError(f"{_flag(name)} {value}: expected 0 (dense) or more")
    post_norm = options.post_norm or not (
        options.encoder_normalize_before and options.decoder_normalize_before
    )

    if _count_expert_layers(options) == 0:
        wants_experts = options.smoe_strata is not None or options.moe_expert_count is not None
        if (
            wants_experts
            or expert_layer_period(options, "encoder")
            or expert_layer_period(options, "decoder")
        ):
            raise OptionError(
                f"--moe-freq {options.moe_freq} makes none of {options.encoder_layers}+"
                f"{options.decoder_layers} layers an expert layer: lower it, or for a dense model "
                "give --moe-freq 0 without --smoe-strata and --moe-expert-count"
            )
        return None
    if post_norm:
        raise OptionError(
            f"--post-norm with --smoe-strata {format_strata(strata)}: a stratified block "
            "normalises its own input; drop --post-norm, or use it with --moe-freq 0"
        )
    return strata


def _check_pass_curriculum(options, strata):
    updates = options.smoe_pass_curriculum
    if updates < 0:
        raise OptionError(f"--smoe-pass-curriculum {updates}: expected 0 (none) or more updates")
    if updates and (len(strata) == 1 or options.smoe_stacking):
        flags = "--smoe-stacking" if options.smoe_stacking else f"--smoe-strata {strata[0]}"
        raise OptionError(
            f"--smoe-pass-curriculum {updates} with {flags}: no token leaves a block of this kind "
            "early or late; drop --smoe-pass-curriculum"
        )


def _count_layers(options):
    return options.encoder_layers + options.decoder_layers


def _count_expert_layers(options):
    return sum(
        is_expert_layer(options, side, index)
        for side in ("encoder", "decoder")
        for index in range(getattr(options, f"{side}_layers"))
    )
