"""Parameters and forward FLOPs per token of every row of the paper's tables, from the real model."""

import argparse
from types import SimpleNamespace

import torch

from fairseq_smoe.paper_rows import TABLES
from fairseq_smoe.strata import mean_requested_capacity

# The paper counts attention over a context whose length it does not give; this one brings the
# dense models of both tables within 1% of the printed figures.
CONTEXT_LENGTH = 2430


def add_arguments(parser):
    parser.add_argument("table", choices=[*TABLES, "all"], nargs="?", default="all")


def run(args):
    for name, table in TABLES.items():
        if args.table in (name, "all"):
            print(render(name, table), end="\n\n")


def render(name, table):
    """A Markdown table: our figures beside the printed ones."""
    lines = [
        f"| {name} | options | parameters | paper | MFLOPs/token | paper | relative to dense | paper |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    dense = None
    for row in table.rows:
        params, flops = count_row(table, row)
        dense = dense or flops
        lines.append(
            f"| {row.method} | `{row.options}` | {params / 1e6:.1f}M | {row.params} "
            f"| {flops / 1e6:.0f} | {row.mflops} | {flops / dense:.3f} "
            f"| {row.mflops / table.rows[0].mflops:.3f} |"
        )
    return "\n".join(lines)


def count_row(table, row):
    """``(parameters, forward FLOPs per token)`` of one row at the paper's size."""
    model, options = build_on_meta(
        ["--arch", table.arch, *row.options.split()], table.vocab_size
    )
    return count_parameters(model), flops_per_token(model, options)


def count_parameters(model):
    """Trained parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model, options):
    """Forward FLOPs per token as in Kaplan et al. 2020, under uniform gates.

    Two per weight that a token meets, the embedding matrix counted once as output projection, and
    2 * d per position of the context in every attention sublayer.

    Args:
        model: an ``SMoETransformer``, also on the meta device.
        options: the namespace it was built from.
    """
    from fairseq_smoe.layers import expert_layers

    shared = count_parameters(model)
    visited = 0
    for _, layer in expert_layers(model):
        block = getattr(layer.expert_block, "block", layer.expert_block)
        experts = count_parameters(block.experts)
        shared -= experts
        visited += experts / sum(block.strata) * _experts_per_token(options, block)
    attention_sublayers = options.encoder_layers + 2 * options.decoder_layers
    attention = 2 * options.encoder_embed_dim * CONTEXT_LENGTH * attention_sublayers
    return 2 * (shared + visited) + attention


def _experts_per_token(options, block):
    if options.smoe_stacking:
        passes = len(block.strata)
    else:
        passes = mean_requested_capacity(block.strata)
    return block.top_k * passes


def build_on_meta(command_line, vocab_size):
    """Build a model without memory for its weights.

    Args:
        command_line: model options, as for fairseq-train.
        vocab_size: pieces, without fairseq's four special symbols.

    Returns:
        ``(model, options)``
    """
    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY

    from fairseq_smoe.model import SMoETransformer
    from fairseq_smoe.options import SMoETransformerOptions

    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--arch")
    SMoETransformer.add_args(parser)
    given, _ = parser.parse_known_args(command_line)  # leaves out options of the criterion
    ARCH_CONFIG_REGISTRY[given.arch](given)
    options = SMoETransformerOptions.from_namespace(given)
    dictionary = Dictionary()
    for i in range(vocab_size):
        dictionary.add_symbol(str(i))
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device("meta"):
        return SMoETransformer.build_model(options, task), options
