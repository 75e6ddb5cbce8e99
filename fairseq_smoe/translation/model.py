"""``smoe_transformer``: fairseq's transformer with stratified blocks as FFN sublayers."""

from argparse import Namespace
from dataclasses import fields

import torch
import torch.distributed as dist
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModelBase,
)

from fairseq_smoe.checkpoints.parts import load_experts
from fairseq_smoe.moe.doors import pool_of
from fairseq_smoe.moe.expert_group import form_expert_group
from fairseq_smoe.translation.checkpoint_layout import (
    check_layout,
    check_vocabulary,
    without_needless_routers,
)
from fairseq_smoe.translation.depth_init import scale_by_depth
from fairseq_smoe.translation.layer_drop import drop_alike
from fairseq_smoe.translation.layers import (
    SMoEDecoderLayer,
    SMoEEncoderLayer,
    expert_layers,
    find_expert_group,
    freeze_backbone,
    moefy_dense_layers,
)
from fairseq_smoe.translation.options import (
    SMoETransformerOptions,
    check_options,
    expert_parallel_size,
    is_expert_layer,
)
from fairseq_smoe.translation.train_only import train_only
from fairseq_smoe.translation.untrained_experts import close_experts


class SMoEEncoder(TransformerEncoderBase):
    """Transformer encoder in which every Nth layer is an expert layer."""

    def __init__(self, cfg, dictionary, embed_tokens):
        self.layers_built = 0
        super().__init__(cfg, dictionary, embed_tokens)
        if cfg.in_step:
            self.layers = drop_alike(self.layers, "encoder")

    def build_encoder_layer(self, cfg):
        index, self.layers_built = self.layers_built, self.layers_built + 1
        if is_expert_layer(cfg, "encoder", index):
            return SMoEEncoderLayer(cfg)
        return super().build_encoder_layer(cfg)


class SMoEDecoder(TransformerDecoderBase):
    """Transformer decoder in which every Nth layer is an expert layer."""

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False):
        self.layers_built = 0
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn)
        self.untrained_tokens = cfg.untrained_tokens
        if cfg.in_step:
            self.layers = drop_alike(self.layers, "decoder")

    def forward(self, *args, features_only=False, loss=None, **kwargs):
        """As the parent's. With a :class:`~fairseq_smoe.translation.chunked_loss.TargetLoss`, the
        loss takes the place of the logits."""
        features_only = features_only or loss is not None
        x, extra = super().forward(*args, features_only=features_only, **kwargs)
        if loss is not None:
            x = loss(x, self.output_projection.weight, self.untrained_tokens)
        return x, extra

    def output_layer(self, features):
        """Logits; those of tokens that have not been trained are -inf."""
        logits = super().output_layer(features)
        if self.untrained_tokens:
            logits[..., -self.untrained_tokens :] = -torch.inf
        return logits

    def build_decoder_layer(self, cfg, no_encoder_attn=False):
        index, self.layers_built = self.layers_built, self.layers_built + 1
        if is_expert_layer(cfg, "decoder", index):
            return SMoEDecoderLayer(cfg, no_encoder_attn)
        return super().build_decoder_layer(cfg, no_encoder_attn)


@register_model("smoe_transformer", dataclass=SMoETransformerOptions)
class SMoETransformer(TransformerModelBase):
    """Encoder-decoder translation model with stratified expert layers (paper, section 3)."""

    computes_loss = True  # see forward()

    @classmethod
    def add_args(cls, parser):
        # for a bool that defaults to True, fairseq makes a flag that switches it off; but in old
        # command lines these flags switch the options on
        switched_on = SMoETransformerOptions(
            encoder_normalize_before=False,
            decoder_normalize_before=False,
            share_all_embeddings=False,
            moe_gating_use_fp32=False,
        )
        gen_parser_from_dataclass(parser, switched_on, delete_default=True)

    @classmethod
    def build_model(cls, cfg, task):
        # a checkpoint of an earlier version lacks the options that came later
        options = Namespace(
            **{f.name: getattr(cfg, f.name, f.default) for f in fields(SMoETransformerOptions)}
        )
        strata = check_options(options)
        if options.post_norm:
            options.encoder_normalize_before = options.decoder_normalize_before = False
        if options.decoder_embed_dim is None:
            options.decoder_embed_dim = options.encoder_embed_dim
        if options.decoder_ffn_embed_dim is None:
            options.decoder_ffn_embed_dim = options.encoder_ffn_embed_dim
        options.decoder_input_dim = options.decoder_output_dim = options.decoder_embed_dim
        options.strata = strata
        options.expert_group = None
        # whether this is one of several processes that train a model together
        options.in_step = (
            dist.is_initialized()
            and dist.get_world_size() > 1
            and getattr(task, "trains_in_step", True)
        )
        if strata is not None and options.in_step:
            options.expert_group = form_expert_group(
                expert_parallel_size(options, pool_of(options, strata), dist.get_world_size()),
                getattr(getattr(task, "args", None), "distributed_timeout", None),
            )
        cfg = TransformerConfig.from_namespace(options)
        model = super().build_model(cfg, task)
        if options.smoe_depth_init:
            scale_by_depth(model)
        if options.moefy_dense:
            moefy_dense_layers(model, cfg)
        if not all(layer.routed_block.experts.trains_backbone for _, layer in expert_layers(model)):
            freeze_backbone(model)
        if options.untrained_experts:
            close_experts(model, options.untrained_experts)
        if options.train_only:
            train_only(model, options.train_only)
        return model

    def forward(self, src_tokens, src_lengths, prev_output_tokens, loss=None, **kwargs):
        """As the parent's. With a :class:`~fairseq_smoe.translation.chunked_loss.TargetLoss`, the
        loss takes the place of the logits."""
        if loss is None:
            return super().forward(src_tokens, src_lengths, prev_output_tokens, **kwargs)
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        return self.decoder(prev_output_tokens, encoder_out=encoder_out, loss=loss)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return SMoEEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return SMoEDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        state_dict = without_needless_routers(self, state_dict)
        if strict:
            check_vocabulary(self, state_dict)
            check_layout(self, state_dict, find_expert_group(self))
        state_dict = load_experts(self, state_dict, find_expert_group(self))
        return super().load_state_dict(state_dict, strict, model_cfg, args)


def _set_defaults(args, **defaults):
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)


@register_model_architecture("smoe_transformer", "smoe_transformer_big")
def big_architecture(args):
    """The size of the paper's M15 and OPUS-100 models."""
    _set_defaults(
        args,
        encoder_embed_dim=1024,
        encoder_ffn_embed_dim=4096,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
    )


@register_model_architecture("smoe_transformer", "smoe_transformer_tiny")
def tiny_architecture(args):
    """For tests and demonstrations: trains in minutes on a laptop."""
    _set_defaults(
        args,
        encoder_embed_dim=64,
        encoder_ffn_embed_dim=128,
        encoder_layers=2,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_attention_heads=4,
    )
