"""Parameters and forward FLOPs per token of every row of the paper's tables, from real models."""

import argparse
from itertools import pairwise
from types import SimpleNamespace

import torch

from fairseq_smoe.benchmarks.training_command import model_options, vocab_size
from fairseq_smoe.moe.experts import Experts
from fairseq_smoe.moe.moefied_ffn import MoefiedFFN

# The paper does not give the length of the context that it counts attention over. With this one the
# dense models of both tables are within 1% of the printed figures.
CONTEXT_LENGTH = 2430


def render(benchmark, context=CONTEXT_LENGTH):
    """A Markdown table: our figures, and the paper's if there are any.

    Args:
        context: see :func:`flops_per_token`.
    """
    lines = [
        f"| {benchmark.title} | options | parameters | paper | MFLOPs/token | paper "
        "| relative to dense | paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    dense, notes = None, []
    for row in benchmark.rows:
        params, flops, fixed = count_row(benchmark, row, context=context)
        if fixed:
            notes.append(f"{row.name}: besides {fixed / 1e9:.0f} GFLOPs per forward pass.")
        dense = dense or flops
        printed = relative = ""
        if row.mflops:
            printed, relative = row.mflops, f"{row.mflops / benchmark.rows[0].mflops:.3f}"
        lines.append(
            f"| {row.name} | `{row.options}` | {_millions(params, 1)}M | {row.params} "
            f"| {_millions(flops, 0)} | {printed} | {flops / dense:.3f} | {relative} |"
        )
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def _millions(number, digits):
    """With at least three figures."""
    return f"{number / 1e6:.{digits if number >= 1e7 else 2}f}"


def count_row(benchmark, row, scale="paper", context=CONTEXT_LENGTH):
    """``(parameters, forward FLOPs per token, FLOPs per forward pass)`` of a row of a benchmark at a
    scale. The last are taken whatever the number of tokens.

    Args:
        context: see :func:`flops_per_token`.
    """
    model, options = build_on_meta(
        model_options(benchmark, row, scale), vocab_size(benchmark, scale)
    )
    flops = flops_per_token(model, options, context)
    return count_parameters(model), flops, flops_per_forward(model)


def count_parameters(model):
    """Trained parameters; shared ones count once, and padding of experts does not count."""
    padding = sum(m.num_padding() for m in model.modules() if isinstance(m, Experts))
    return sum(parameter.numel() for parameter in model.parameters()) - padding


def flops_per_token(model, options, context=CONTEXT_LENGTH):
    """Forward FLOPs per token as in Kaplan et al. 2020, under uniform gates.

    Two FLOPs per weight that a token is multiplied with (the embedding matrix counts once, as
    output projection), and 2 * d per position of the context in every attention sublayer. If a
    block splits tokens into heads, every head is multiplied with the weights inside it.

    Args:
        model: an ``SMoETransformer``, also on the meta device.
        options: the namespace it was built from.
        context: number of tokens that a token attends to.
    """
    from fairseq_smoe.translation.layers import expert_layers

    shared = count_parameters(model)
    for ffn in (module for module in model.modules() if isinstance(module, MoefiedFFN)):
        shared += ffn.experts.params_used(range(1), 1) - count_parameters(ffn)
    visited = 0
    for _, layer in expert_layers(model):
        heads = 1
        for outer, inner in pairwise(layer.nested_blocks):
            parts = getattr(outer, "heads", 1)
            shared += heads * (parts - 1) * count_parameters(inner)
            heads *= parts
        block = layer.routed_block
        shared -= heads * count_parameters(block.experts)
        passes = zip(block.expected_visits(), block.visible, block.expected_choices())
        visited += heads * sum(
            visits * block.experts.params_used(seen, choices) for visits, seen, choices in passes
        )
    attention_sublayers = options.encoder_layers + 2 * options.decoder_layers
    attention = 2 * options.encoder_embed_dim * context * attention_sublayers
    return 2 * (shared + visited) + attention


def flops_per_forward(model):
    """FLOPs that a forward pass takes whatever the number of tokens, to make the weights of experts
    from their parameters."""
    from fairseq_smoe.translation.layers import expert_layers

    return sum(layer.routed_block.experts.forward_flops() for _, layer in expert_layers(model))


def build_on_meta(command_line, vocab_size):
    """Build a model on the meta device, without memory for its weights.

    Args:
        command_line: model options, as for fairseq-train.
        vocab_size: pieces, without fairseq's four special symbols.

    Returns:
        ``(model, options)``
    """
    from fairseq.data import Dictionary

    from fairseq_smoe.translation.model import SMoETransformer

    options = parse_model_options(command_line)
    dictionary = Dictionary()
    for i in range(vocab_size):
        dictionary.add_symbol(str(i))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device("meta"):
        return SMoETransformer.build_model(options, task), options


def parse_model_options(command_line):
    """The namespace that fairseq-train makes from the model options, without all other options."""
    from fairseq.models import ARCH_CONFIG_REGISTRY

    from fairseq_smoe.translation.model import SMoETransformer
    from fairseq_smoe.translation.options import SMoETransformerOptions

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--arch")
    SMoETransformer.add_args(parser)
    given, _ = parser.parse_known_args(command_line)
    ARCH_CONFIG_REGISTRY[given.arch](given)
    return SMoETransformerOptions.from_namespace(given)
