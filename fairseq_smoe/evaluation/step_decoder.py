"""A decoder for beam search: one token of every hypothesis at a time.

fairseq's decoder layers are written for whole sentences. In a step, they concatenate the keys and
values of every layer with those of the new tokens, and reorder them layer by layer. Here those of
all layers are in one tensor with room for more, which is reordered at once, and each attention makes
query, key and value with one product.

Letters in names: R rows, that is hypotheses; B sentences, each with R / B rows; D model dim, H
heads, d dim of a head, L layers, T positions so far, S positions of the source.
"""

from functools import partial

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import nn

from fairseq_smoe.evaluation.int8 import Int8Linear
from fairseq_smoe.translation.layers import ExpertLayerMixin

ROOM = 32  # positions by which the memory of keys and values grows


def can_step(decoder):
    """Whether a decoder has only what :class:`StepDecoder` computes."""
    plain = (
        *(decoder.adaptive_softmax, decoder.project_in_dim, decoder.project_out_dim),
        *(decoder.quant_noise, decoder.layernorm_embedding),
    )
    layers = list(decoder.layers.children())
    return (
        type(decoder).extract_features_scriptable is _stock("extract_features_scriptable")
        and all(part is None for part in plain)
        and not decoder.cross_self_attention
        and decoder.layer_norm is not None
        and all(map(_is_plain, layers))
    )


def _stock(name):
    from fairseq.models.transformer import TransformerDecoderBase

    return getattr(TransformerDecoderBase, name)


def _is_plain(layer):
    return (
        isinstance(layer, TransformerDecoderLayerBase)
        and layer.normalize_before
        and layer.encoder_attn is not None
        and not any(
            getattr(layer, name, None) is not None
            for name in ("c_attn", "attn_ln", "ffn_layernorm", "w_resid")
        )
        and all(_is_plain_attention(a) for a in (layer.self_attn, layer.encoder_attn))
    )


def _is_plain_attention(attention):
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
    return (
        type(attention) is MultiheadAttention
        and attention.bias_k is None
        and not attention.add_zero_attn
        and len({type(part) for part in projections}) == 1
        and type(attention.q_proj) in (nn.Linear, Int8Linear)
    )


class State:
    """Keys and values of the hypotheses of a batch.

    Attributes:
        own_LXRHTd: of the target so far, keys and values (X), with room for more positions.
        source_L: ``(keys, values)`` of the source, (B, H, S, d), for each layer.
        mask_B11S: True where a source has a token; None if all have the same length.
        beam: rows of a sentence.
    """

    def __init__(self, own_LXRHTd, source_L, mask_B11S, beam):
        self.own_LXRHTd, self.source_L = own_LXRHTd, source_L
        self.mask_B11S, self.beam = mask_B11S, beam

    def reorder(self, order_R):
        """Let row i go on from what was row ``order_R[i]``, of the same sentence or, if sentences
        have been finished, of one behind it."""
        rows = self.own_LXRHTd.size(2)
        if len(order_R) == rows and torch.equal(order_R, torch.arange(rows, device=order_R.device)):
            return
        self.own_LXRHTd = self.own_LXRHTd.index_select(2, order_R)
        if len(order_R) != rows:
            order_B = order_R[:: self.beam] // self.beam
            self.source_L = [
                tuple(part.index_select(0, order_B) for part in own) for own in self.source_L
            ]
            if self.mask_B11S is not None:
                self.mask_B11S = self.mask_B11S.index_select(0, order_B)


class StepDecoder:
    """Computes what a fairseq decoder computes for the last token of each hypothesis.

    Args:
        decoder: a fairseq transformer decoder for which :func:`can_step` is true, in evaluation
            mode. Its parameters are used where they are, except that those of the projections
            that are computed together get a common memory.
    """

    def __init__(self, decoder):
        self._decoder = decoder
        self._layers = list(decoder.layers.children())
        self._own = [_joint(a.self_attn, "q_proj", "k_proj", "v_proj") for a in self._layers]
        self._source = [_joint(a.encoder_attn, "k_proj", "v_proj") for a in self._layers]
        self._heads = self._layers[0].self_attn.num_heads

    def start(self, encoder_out, beam):
        """The :class:`State` before the first token.

        Args:
            encoder_out: fairseq's, (S, R, D).
            beam: rows of a sentence.
        """
        source_SBD = encoder_out["encoder_out"][0][:, ::beam]
        mask_B11S = None
        padding = encoder_out["encoder_padding_mask"]
        if padding and padding[0].any():
            mask_B11S = padding[0][::beam].logical_not()[:, None, None, :]
        source_BSD = source_SBD.transpose(0, 1).contiguous()
        source_L = []
        for project in self._source:
            keys, values = project(source_BSD).chunk(2, dim=-1)
            source_L.append(tuple(self._split(part).contiguous() for part in (keys, values)))
        rows, dim = encoder_out["encoder_out"][0].shape[1:]
        shape = len(self._layers), 2, rows, self._heads, 0, dim // self._heads
        return State(source_BSD.new_empty(shape), source_L, mask_B11S, beam)

    def _split(self, x_BSD):
        """(B, S, D) -> (B, H, S, d)"""
        return x_BSD.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def step(self, tokens_RT, state):
        """Logits of the next token, (R, V).

        Args:
            tokens_RT: all tokens so far; only the last is new.
            state: :class:`State` of the tokens before, which is continued.
        """
        decoder, position = self._decoder, tokens_RT.size(1) - 1
        own = state.own_LXRHTd
        if position == own.size(4):
            own = state.own_LXRHTd = F.pad(own, (0, 0, 0, ROOM))
        x_RD = decoder.embed_scale * decoder.embed_tokens(tokens_RT[:, -1])
        if decoder.embed_positions is not None:
            # an empty state: the position alone is asked for
            x_RD = x_RD + decoder.embed_positions(tokens_RT, incremental_state={})[:, -1]
        for i, layer in enumerate(self._layers):
            x_RD = x_RD + self._attend_to_target(i, layer, x_RD, own[i], position)
            x_RD = x_RD + self._attend_to_source(i, layer, x_RD, state)
            x_RD = _feed_forward(layer, x_RD)
        return decoder.output_layer(decoder.layer_norm(x_RD))

    def _attend_to_target(self, i, layer, x_RD, own_XRHTd, position):
        joint_R3D = self._own[i](layer.self_attn_layer_norm(x_RD))
        query_RHd, *new = joint_R3D.unflatten(-1, (3, self._heads, -1)).unbind(1)
        for memory_RHTd, part_RHd in zip(own_XRHTd, new):
            memory_RHTd[:, :, position] = part_RHd
        keys, values = own_XRHTd[:, :, :, : position + 1]
        found = F.scaled_dot_product_attention(query_RHd.unsqueeze(2), keys, values)
        return layer.self_attn.out_proj(found.reshape(x_RD.shape))

    def _attend_to_source(self, i, layer, x_RD, state):
        attention = layer.encoder_attn
        query_RD = attention.q_proj(layer.encoder_attn_layer_norm(x_RD))
        # the rows of a sentence are queries of the same keys
        query_BHKd = self._split(query_RD.unflatten(0, (-1, state.beam)))
        found_BHKd = F.scaled_dot_product_attention(
            query_BHKd, *state.source_L[i], attn_mask=state.mask_B11S
        )
        return attention.out_proj(found_BHKd.transpose(1, 2).reshape(x_RD.shape))


def _feed_forward(layer, x_RD):
    if isinstance(layer, ExpertLayerMixin):
        y_1RD, stats = layer.expert_block(x_RD.unsqueeze(0))
        layer.keep(stats)
        return y_1RD.squeeze(0)
    hidden_RF = layer.activation_fn(layer.fc1(layer.final_layer_norm(x_RD)))
    return x_RD + layer.fc2(hidden_RF)


def _joint(attention, *names):
    """A function that computes several projections of an attention at once."""
    parts = [getattr(attention, name) for name in names]
    known = vars(attention).setdefault("joint", {})
    if isinstance(parts[0], Int8Linear):
        if names not in known:
            known[names] = Int8Linear.joined(parts)
        return known[names]
    return partial(F.linear, **_merge(parts, names, known))


def _merge(parts, names, known):
    """``{"weight": ..., "bias": ...}`` of several projections in one. The projections' parameters
    become parts of them, so that they take no more memory; a second call finds them so."""
    merged = {}
    for kind in ("weight", "bias") if parts[0].bias is not None else ("weight",):
        own = [getattr(part, kind) for part in parts]
        joint = known.get((names, kind))
        if joint is None or own[0].data_ptr() != joint.data_ptr():
            joint = known[names, kind] = torch.cat([parameter.detach() for parameter in own])
            for parameter, place in zip(own, joint.split([len(parameter) for parameter in own])):
                parameter.data = place
        merged[kind] = joint
    return merged
