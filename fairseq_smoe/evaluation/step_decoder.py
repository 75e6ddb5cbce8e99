"""A decoder for beam search: one token of every hypothesis at a time.

fairseq's decoder layers are written for whole sentences. In a step, they concatenate the keys and
values of every layer with those of the new tokens, and reorder them layer by layer. Here those of
all layers are in one tensor with room for more, which is reordered at once into memory that is
there already, and each attention makes query, key and value with one product.

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
from fairseq_smoe.evaluation.reordered import ReorderedLinear
from fairseq_smoe.translation.layers import ExpertLayerMixin

ROOM = 32  # positions by which the memory of keys and values grows
ROWS_AT_ONCE = 160  # of logits, which are then still in the cache when they are normalised


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
        and type(attention.q_proj) in (nn.Linear, Int8Linear, ReorderedLinear)
    )


class State:
    """Keys and values of the hypotheses of a batch.

    Attributes:
        own_TLXRHd: of the target so far, keys and values (X), with room for more positions.
        source_L: ``(keys, values)`` of the source, (B, H, S, d), for each layer.
        mask_B11S: True where a source has a token; None if all have the same length.
        beam: rows of a sentence.
    """

    def __init__(self, own_TLXRHd, source_L, mask_B11S, beam):
        self.own_TLXRHd, self.source_L = own_TLXRHd, source_L
        self.mask_B11S, self.beam = mask_B11S, beam
        self.length = 0
        self._spare_TLXRHd = torch.empty_like(own_TLXRHd)
        self._log_probs_RV = None

    def lengthen(self):
        """Make room for one more position. Returns its index, from 0."""
        if self.length == len(self.own_TLXRHd):
            self.own_TLXRHd = F.pad(self.own_TLXRHd, (0, 0) * 5 + (0, ROOM))
            self._spare_TLXRHd = torch.empty_like(self.own_TLXRHd)
        self.length += 1
        return self.length - 1

    def memory_of_log_probs(self, shape):
        """Memory that is the same in every step: the system takes its time to hand out so much."""
        if self._log_probs_RV is None:
            self._log_probs_RV = self.own_TLXRHd.new_empty(shape, dtype=torch.float)
        return self._log_probs_RV[: shape[0]]

    def reorder(self, order_R):
        """Let row i go on from what was row ``order_R[i]``, of the same sentence or, if sentences
        have been finished, of one behind it."""
        rows = self.own_TLXRHd.size(3)
        if len(order_R) == rows and torch.equal(order_R, torch.arange(rows, device=order_R.device)):
            return
        own, spare = self.own_TLXRHd, self._spare_TLXRHd
        if len(order_R) != rows:
            spare = own.new_empty(*own.shape[:3], len(order_R), *own.shape[4:])
        torch.index_select(own[: self.length], 3, order_R, out=spare[: self.length])
        self.own_TLXRHd, self._spare_TLXRHd = spare, own
        if len(order_R) != rows:
            self._spare_TLXRHd = torch.empty_like(spare)
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
        shape = 0, len(self._layers), 2, rows, self._heads, dim // self._heads
        return State(source_BSD.new_empty(shape), source_L, mask_B11S, beam)

    def _split(self, x_BSD):
        """(B, S, D) -> (B, H, S, d)"""
        return x_BSD.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def step(self, tokens_RT, state, temperature=1.0):
        """Log probabilities of the next token, (R, V), float32. The next step overwrites them.

        Args:
            tokens_RT: all tokens so far; only the last is new.
            state: :class:`State` of the tokens before, which is continued.
            temperature: that logits are divided by.
        """
        decoder, position = self._decoder, state.lengthen()
        x_RD = decoder.embed_scale * decoder.embed_tokens(tokens_RT[:, -1])
        if decoder.embed_positions is not None:
            # an empty state: the position alone is asked for
            x_RD = x_RD + decoder.embed_positions(tokens_RT, incremental_state={})[:, -1]
        for i, layer in enumerate(self._layers):
            x_RD = x_RD + self._attend_to_target(i, layer, x_RD, state, position)
            x_RD = x_RD + self._attend_to_source(i, layer, x_RD, state)
            x_RD = _feed_forward(layer, x_RD)
        return self._log_probs(decoder.layer_norm(x_RD), state, temperature)

    def _log_probs(self, x_RD, state, temperature):
        shape = len(x_RD), len(self._decoder.dictionary)
        log_probs_RV = state.memory_of_log_probs(shape)
        for x_MD, own_MV in zip(x_RD.split(ROWS_AT_ONCE), log_probs_RV.split(ROWS_AT_ONCE)):
            logits_MV = self._decoder.output_layer(x_MD)
            if temperature != 1:
                logits_MV.div_(temperature)
            torch.log_softmax(logits_MV.float(), -1, out=own_MV)
        return log_probs_RV

    def _attend_to_target(self, i, layer, x_RD, state, position):
        joint_R3D = self._own[i](layer.self_attn_layer_norm(x_RD))
        joint_XRHd = joint_R3D.unflatten(-1, (3, self._heads, -1)).transpose(0, 1)
        own_TXRHd = state.own_TLXRHd[: position + 1, i]
        own_TXRHd[position] = joint_XRHd[1:]
        keys_RHTd, values_RHTd = own_TXRHd.permute(1, 2, 3, 0, 4)
        query_RH1d = joint_XRHd[0].unsqueeze(2)
        found = F.scaled_dot_product_attention(query_RH1d, keys_RHTd, values_RHTd)
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
    kind = type(parts[0])
    if kind is not nn.Linear:
        if names not in known:
            known[names] = kind.joined(parts)
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
