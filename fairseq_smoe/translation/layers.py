"""fairseq's transformer layers with an expert block instead of the FFN sublayer."""

import math
from functools import partial

from fairseq import utils
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from fairseq_smoe.moe.doors import build_sublayer
from fairseq_smoe.moe.expert_kinds.moefied import MoefiedOptions
from fairseq_smoe.moe.moefied_ffn import MoefiedFFN


def build_expert_block(cfg, side):
    """The expert block that the options ask for, with the sizes of ``side``."""
    return build_sublayer(
        getattr(cfg, side).embed_dim,
        getattr(cfg, side).ffn_embed_dim,
        cfg,
        cfg.strata,
        cfg.expert_group,
        cfg.moe_ffn_split,
        dropout=cfg.dropout,
        activation_dropout=_activation_dropout(cfg),
        activation_fn=utils.get_activation_fn(cfg.activation_fn),
    )


def _activation_dropout(cfg):
    return float(cfg.activation_dropout or cfg.relu_dropout or 0)


class _NoFFN(nn.Module):
    """Replaces the parent's FFN sublayer and returns 0, so that the parent's forward pass returns
    the output of attention."""

    def forward(self, x):
        return x.new_zeros(())


class ExpertLayerMixin:
    """Replaces the FFN sublayer of a fairseq transformer layer by an expert block.

    ``routing_stats`` has the :class:`~fairseq_smoe.moe.block.BlockStats` of the last forward pass.
    It is an attribute because fairseq's decoder ignores what a layer returns beyond three values.
    Code that reads it resets it to None.

    ``counts`` has what the gates have counted: for every forward pass in training since it was last
    emptied, one tensor per gate. It is kept here and not in the gates, because with
    --checkpoint-activations their forward pass runs twice.
    """

    def build_fc1(self, *_):
        return _NoFFN()

    def build_fc2(self, *_):
        return nn.Identity()

    def add_expert_block(self, cfg, side):
        self.final_layer_norm = nn.Identity()  # the block owns its LayerNorms
        self.expert_block = build_expert_block(cfg, side)
        self.expert_group = cfg.expert_group
        self.checkpoint_activations = cfg.checkpoint_activations
        self.routing_stats = None
        self.counts = []

    @property
    def nested_blocks(self):
        """The blocks that arrangements have wrapped around each other, from the outermost to the
        :class:`~fairseq_smoe.moe.block.SMoEBlock`."""
        blocks = [self.expert_block]
        while hasattr(blocks[-1], "block"):
            blocks.append(blocks[-1].block)
        return blocks

    @property
    def routed_block(self):
        """The :class:`~fairseq_smoe.moe.block.SMoEBlock` inside any arrangements."""
        return self.nested_blocks[-1]

    @property
    def heads(self):
        """Number of parts of a token that the routed block gets as its tokens."""
        return math.prod(getattr(block, "heads", 1) for block in self.nested_blocks)

    def maybe_checkpointed(self, function):
        """``function``, or with --checkpoint-activations a version that is recomputed in backward.

        fairseq's own wrapper runs the forward pass without gradients. It would lose the gradient of
        the balance loss, which the layer does not return. torch's wrapper keeps it.
        """
        if self.checkpoint_activations and self.training:
            return partial(checkpoint, function, use_reentrant=False)
        return function

    def keep(self, stats):
        """Keep the statistics of a forward pass."""
        self.routing_stats = stats
        if self.training and stats.gates[0].counts is not None:
            self.counts.append([record.counts for record in stats.gates])

    def apply_experts(self, x, padding_mask):
        """(S, B, D) -> (S, B, D) and statistics. Tokens enter the block sentence by sentence, so
        experts fill up in this order."""
        y, stats = self.expert_block(x.transpose(0, 1), padding_mask)
        return y.transpose(0, 1), stats


class SMoEEncoderLayer(ExpertLayerMixin, TransformerEncoderLayerBase):
    """Encoder layer: fairseq's self-attention sublayer, then an expert block."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.add_expert_block(cfg, "encoder")

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        run = self.maybe_checkpointed(self._forward)
        x, stats = run(x, encoder_padding_mask, attn_mask)
        self.keep(stats)
        return x

    def _forward(self, x, encoder_padding_mask, attn_mask):
        x = super().forward(x, encoder_padding_mask, attn_mask)
        return self.apply_experts(x, encoder_padding_mask)


class SMoEDecoderLayer(ExpertLayerMixin, TransformerDecoderLayerBase):
    """Decoder layer: fairseq's attention sublayers, then an expert block."""

    def __init__(self, cfg, no_encoder_attn=False):
        super().__init__(cfg, no_encoder_attn)
        self.add_expert_block(cfg, "decoder")

    def forward(self, x, *args, self_attn_padding_mask=None, **kwargs):
        run = self.maybe_checkpointed(self._forward)
        x, attn, stats = run(x, self_attn_padding_mask, *args, **kwargs)
        self.keep(stats)
        return x, attn, None

    def _forward(self, x, padding_mask, *args, **kwargs):
        x, attn, _ = super().forward(x, *args, self_attn_padding_mask=padding_mask, **kwargs)
        x, stats = self.apply_experts(x, padding_mask)
        return x, attn, stats


def moefy_dense_layers(model, cfg):
    """Replace the FFNs of the dense layers by :class:`~fairseq_smoe.moe.moefied_ffn.MoefiedFFN`
    with the same weights. They stand where the first linear layer was."""
    options = MoefiedOptions.of(cfg)
    for layer in model.modules():
        dense = isinstance(layer, (TransformerEncoderLayerBase, TransformerDecoderLayerBase))
        if dense and not isinstance(layer, ExpertLayerMixin):
            layer.fc1 = MoefiedFFN(layer.fc1, layer.fc2, options, _activation_dropout(cfg))
            layer.fc2 = nn.Identity()
            layer.activation_fn = nn.Identity()
            layer.activation_dropout_module = nn.Identity()


def expert_layers(model):
    """``(name, layer)`` of every expert layer in ``model``, encoder first."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ExpertLayerMixin)
    ]


def freeze_backbone(model):
    """Train only what expert layers add to a dense model: not the layers around the expert blocks,
    and not the blocks' LayerNorms. Parameters that are frozen already stay so."""
    trained = set()
    for _, layer in expert_layers(model):
        norms = set(layer.routed_block.norms.parameters())
        trained |= {p for p in layer.expert_block.parameters() if p.requires_grad} - norms
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)


def find_expert_group(model):
    """The :class:`~fairseq_smoe.moe.expert_group.ExpertGroup` over which a model's experts are
    sharded; None if this process holds all of them."""
    groups = [layer.expert_group for _, layer in expert_layers(model)]
    return groups[0] if groups else None
