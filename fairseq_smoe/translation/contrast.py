"""Self-contrast decoding (SCMoE, Shi et al. 2024, arXiv 2405.14507): what a model says, against
what it says when every token visits a single expert.

Letters in names: B sentences, R rows, which are the beams of all sentences, S source tokens, V
vocabulary. Where the decoder computes both views, it has 2 R rows: for every sentence the beams of
the strong view, then those of the weak one.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable

import torch
from fairseq.search import Sampling
from fairseq.sequence_generator import EnsembleModel
from fairseq.token_generation_constraints import unpack_constraints

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.single_expert import STRONG, SingleExpert, scrambled, viewed
from fairseq_smoe.translation.layers import ExpertLayerMixin, expert_layers
from fairseq_smoe.translation.searches import SamplingWhatIsPossible

# nats that a token outside of V_valid loses. It then comes after all tokens of V_valid, but is not
# impossible: fairseq's search ends with an error where it finds nothing to go on with
PENALTY = 1000.0
MANY = 64  # a row has many tokens if they are more than this fraction of the vocabulary
FORCED = "forced_tokens"  # in a batch's net_input


@dataclass(frozen=True)
class Limits:
    """What the generator allows.

    Attributes:
        beam_size: beams of a sentence.
        never: (N,) indices of tokens that it never takes by itself.
        min_len: step before which no translation ends.
        last_step: function from a batch's net_input to the step at which all translations end.
    """

    beam_size: int
    never: torch.Tensor
    min_len: int
    last_step: Callable


@dataclass(frozen=True)
class Source:
    """The sentences that are being translated.

    Attributes:
        encoder_out: of fairseq's encoder, for B sentences; with a weak encoder for 2 B: each
            sentence as the strong encoder sees it, then as the weak one does.
        key_B: pseudo-random numbers that depend on the sentences alone.
        forced: (B, P) tokens that the translations begin with, and (B, C) tokens that they have to
            contain, padded.
        last_step: at which all translations end.
        expanded: whether the generator has made beams of the sentences.
    """

    encoder_out: dict
    key_B: torch.Tensor
    forced: tuple
    last_step: int
    expanded: bool = False


def contrast(generator, model, options, seed, with_attention=True):
    """Let a generator decode with contrast.

    Args:
        generator: a ``SequenceGenerator`` for ``model``, whose limits do not change any more.
        model: one that :func:`check_contrast` accepts.
        options: :class:`~fairseq_smoe.translation.contrast_options.ContrastOptions`
        seed: of random draws of experts.
        with_attention: whether hypotheses need the attention to the source.
    """
    never = [generator.pad]
    if generator.token_indices_to_suppress is not None:
        never += generator.token_indices_to_suppress.tolist()

    of_source = generator.max_len_a, generator.max_len_b, generator.max_len - 1
    if generator.match_source_len:
        of_source = None
    limits = Limits(
        generator.beam_size,
        torch.tensor(never),
        generator.min_len,
        partial(last_step, of_source=of_source),
    )
    special = generator.pad, generator.eos
    generator.model = ContrastModel(model, options, limits, special, seed, with_attention).eval()
    if isinstance(search := generator.search, Sampling):
        generator.search = SamplingWhatIsPossible(
            generator.tgt_dict, search.sampling_topk, search.sampling_topp, PENALTY
        )


def last_step(net_input, of_source):
    """The step at which fairseq's generator ends all translations of a batch.

    Args:
        of_source: a, b and c for the lesser of a * source tokens + b and c; None for
            --match-source-len.
    """
    if of_source is None:
        return int(net_input["src_lengths"].max())
    factor, more, most = of_source
    return min(int(factor * net_input["src_tokens"].size(1) + more), most)


def check_contrast(options, models, generation):
    """
    Args:
        options: :class:`~fairseq_smoe.translation.contrast_options.ContrastOptions`
        models: that are going to translate.
        generation: options of the generator.

    Raises:
        OptionError: an option is wrong, both views would be the same, or something else is not
            possible with contrast.
    """
    options.check()
    if not options.on:
        return
    flag = f"--scmoe-beta {options.scmoe_beta}"
    if getattr(generation, "score_reference", False):
        raise OptionError(
            f"{flag} with --score-reference: is for translating; leave one of them out"
        )
    if len(models) > 1:
        raise OptionError(
            f"{flag}: contrasts two views of one model, and --path names {len(models)}; give one "
            "checkpoint"
        )
    (model,) = models
    if not expert_layers(model):
        raise OptionError(
            f"{flag}: the model has no experts, so there is no weak view of it; leave it out"
        )
    if not expert_layers(model.decoder) and not options.scmoe_weak_encoder:
        raise OptionError(
            f"{flag}: only the encoder of the model has experts, so both views of the decoder are "
            "the same; give --scmoe-weak-encoder, too"
        )
    if not expert_layers(model.encoder) and options.scmoe_weak_encoder:
        raise OptionError(
            "--scmoe-weak-encoder: the encoder of the model has no experts; leave it out"
        )
    if model.decoder.cross_self_attention:
        raise OptionError(
            f"{flag}: not possible for a model that was trained with --cross-self-attention; leave "
            "it out"
        )


def with_forced(sample, prefix_tokens, constraints, pad):
    """A batch that also says which tokens the search is going to force.

    Args:
        prefix_tokens: (B, P) with padding behind, or None.
        constraints: (B, C) as packed by fairseq, or None.
    """
    tokens_BS = sample["net_input"]["src_tokens"]
    nothing = tokens_BS.new_empty(len(tokens_BS), 0)
    contained = nothing
    if constraints is not None:
        of_sentence = [
            torch.cat([*unpack_constraints(row), row.new_empty(0)]) for row in constraints.cpu()
        ]
        contained = torch.nn.utils.rnn.pad_sequence(of_sentence, True, pad).to(tokens_BS)
    begin = nothing if prefix_tokens is None else prefix_tokens
    return {**sample, "net_input": {**sample["net_input"], FORCED: (begin, contained)}}


class ContrastModel(EnsembleModel):
    """For ``SequenceGenerator``: a model in two views, with one set of parameters.

    In the strong view, gates route tokens as ever; in the weak one, every token visits a single
    expert. With the probabilities p_s and p_w of the views, the next token is scored by

        log_softmax((1 + beta) log p_s - beta log p_w)   over V_valid,
        V_valid = {tokens with p_s of at least alpha * (the greatest p_s)}

    Both views see the prefix that was found by contrast. What is the same in both is computed once:
    the encoder, and the decoder up to its first expert block. From there on, the rows of both views
    are one batch, with keys and values of their own in self-attention; those of the attention to
    the source belong to sentences, not rows.

    The projection to the vocabulary has no bias, so the contrast of logits is the projection of the
    contrast of features, (1 + beta) h_s - beta h_w.
    """

    def __init__(self, model, options, limits, special, seed, with_attention):
        super().__init__([model])
        self.beta, self.alpha = options.scmoe_beta, options.scmoe_alpha
        self.rule, self.weak_encoder = SingleExpert(options.rank()), options.scmoe_weak_encoder
        self.limits = limits
        self.pad, self.eos = special
        self.seed = seed
        self.with_attention = with_attention
        # not set by fairseq's own generator, but by LeanBeamModel, on the model
        model.decoder.set_beam_size(1)
        self.layers = {
            side: [layer for _, layer in expert_layers(getattr(model, side))]
            for side in ("encoder", "decoder")
        }
        # decoder layers that run once for both views; the next one ends with the first block
        self.num_shared = 0
        if not self.weak_encoder:
            self.num_shared = next(
                number
                for number, layer in enumerate(model.decoder.layers)
                if isinstance(layer, ExpertLayerMixin)
            )

    # ----------------------------------------------------------------------------------
    # sentences

    def forward_encoder(self, net_input):
        """A list with the :class:`Source` of a batch."""
        net_input = {n: value for n, value in net_input.items() if n != "prev_output_tokens"}
        forced = net_input.pop(FORCED, ())
        tokens_BS = net_input["src_tokens"]
        key_BS, key_B = self._keys(tokens_BS)
        if self.weak_encoder:
            doubled = {n: value.repeat_interleave(2, dim=0) for n, value in net_input.items()}
            keys = torch.stack([torch.full_like(key_BS, STRONG), key_BS], 1).flatten(0, 1)
            with self._views("encoder", keys, _every_second):
                encoder_out = self.single_model.encoder(**doubled)
        else:
            encoder_out = self.single_model.encoder(**net_input)
        return [Source(encoder_out, key_B, forced, self.limits.last_step(net_input))]

    def reorder_encoder_out(self, encoder_outs, new_order):
        """The sentences that are left. There are no copies of them for every beam."""
        (source,) = encoder_outs
        sentence_B = new_order[:: self.limits.beam_size]
        if not source.expanded:
            return [replace(source, expanded=True)]
        if len(sentence_B) == len(source.key_B):
            return encoder_outs
        sentence_B = sentence_B // self.limits.beam_size
        encoder = self.single_model.encoder
        return [
            replace(
                source,
                encoder_out=encoder.reorder_encoder_out(
                    source.encoder_out, self._encoded(sentence_B)
                ),
                key_B=source.key_B[sentence_B],
                forced=tuple(tokens[sentence_B] for tokens in source.forced),
            )
        ]

    def _encoded(self, sentence_B):
        """Where sentences are in what the encoder returns."""
        if not self.weak_encoder:
            return sentence_B
        return torch.stack([2 * sentence_B, 2 * sentence_B + 1], 1).view(-1)

    def _keys(self, tokens_BS):
        """Pseudo-random numbers: (B, S) of the tokens of sentences, and (B,) of sentences. They do
        not depend on the padding, so not on the batch."""
        words_BS = tokens_BS.ne(self.pad)
        place_BS = words_BS.cumsum(1)
        key_BS = scrambled(tokens_BS + (place_BS << 32), self.seed)
        key_B = scrambled((key_BS * words_BS).sum(1))
        return scrambled(key_BS + key_B.unsqueeze(1)), key_B

    # ----------------------------------------------------------------------------------
    # rows

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """(R, V) log-probabilities of the next token, and (R, S) the attention of the strong view.

        Args:
            tokens: (R, T) the prefixes, with fairseq's end of sentence in front.
        """
        (source,), (state,) = encoder_outs, incremental_states
        decoder, step = self.single_model.decoder, tokens.size(1) - 1
        # only rows of score -inf, which fairseq does not remove, can have padding
        tokens = tokens.masked_fill(tokens == self.pad, self.eos)
        key_R = source.key_B.repeat_interleave(self.beam)
        if self.rule.rank is None:
            key_R = scrambled(key_R ^ tokens[:, -1], step)
        keys = self._both(torch.full_like(key_R, STRONG), key_R).unsqueeze(1)
        seen = self._both(tokens, tokens) if self.weak_encoder else tokens
        with self._views("decoder", keys, lambda rows: self._halves(rows)[0]):
            features, extra = decoder.extract_features(
                seen, encoder_out=source.encoder_out, incremental_state=state
            )
        log_probs = self._contrast(*self._halves(features[:, -1]), source, step, temperature)
        (attention,) = extra["attn"]
        if attention is None or not self.with_attention:
            return log_probs, None
        # if the last layer has the first block, its attention is computed once
        once = len(attention) == len(key_R)
        return log_probs, attention[:, -1] if once else self._halves(attention[:, -1])[0]

    @property
    def beam(self):
        return self.limits.beam_size

    def _both(self, strong_R, weak_R):
        """The rows of both views, (2 R, ...)."""
        views = [rows.unflatten(0, (-1, self.beam)) for rows in (strong_R, weak_R)]
        return torch.stack(views, 1).flatten(0, 2)

    def _halves(self, rows):
        """The rows of each view, (R, ...), from those of both."""
        return [
            half.reshape(-1, *rows.shape[1:])
            for half in rows.unflatten(0, (-1, 2, self.beam)).unbind(1)
        ]

    @contextmanager
    def _views(self, side, keys, strong):
        """Let the expert layers of one side compute both views.

        Args:
            side: "encoder" or "decoder".
            keys: see :class:`~fairseq_smoe.moe.single_expert.View`.
            strong: takes the rows of the strong view.
        """
        layers = self.layers[side]
        hooks = []

        def begin_both(block, arguments):
            rows, padding_mask = arguments
            return self._both(rows, rows), padding_mask

        def count_strong(block, arguments, outputs):
            y, stats = outputs
            return y, replace(stats, passes=strong(stats.passes))

        try:
            if side == "decoder" and not self.weak_encoder:
                hooks.append(layers[0].expert_block.register_forward_pre_hook(begin_both))
            for layer in layers:
                # before the hooks that count passes
                block = layer.expert_block
                hooks.append(block.register_forward_hook(count_strong, prepend=True))
            with viewed([layer.routed_block for layer in layers], self.rule, keys):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def reorder_incremental_state(self, incremental_states, new_order):
        """Keys and values of the rows ``new_order``, (R,)."""
        (state,) = incremental_states
        first_of_both = new_order + new_order // self.beam * self.beam
        both = self._both(first_of_both, first_of_both + self.beam)
        encoded = self._encoded(new_order[:: self.beam] // self.beam)
        for number, layer in enumerate(self.single_model.decoder.layers):
            once = number <= self.num_shared and not self.weak_encoder
            layer.self_attn.reorder_incremental_state(state, new_order if once else both)
            if layer.encoder_attn is not None:  # changes only if sentences have been removed
                layer.encoder_attn.reorder_incremental_state(state, encoded)

    # ----------------------------------------------------------------------------------
    # the contrast

    def _contrast(self, strong_RD, weak_RD, source, step, temperature):
        """(R, V) log-probabilities from the features of both views, in float32.

        Tokens outside of V_valid are ordered by the strong view. Where V_valid has few tokens, as
        with any model that has learned something, the logits of the contrast are computed for these
        alone.
        """
        project = self.single_model.decoder.output_layer
        mixed_RD = torch.lerp(strong_RD.float(), weak_RD.float(), -self.beta)
        # at the last step, the end is forced
        if self.alpha == 0 or step >= source.last_step:
            return project(mixed_RD.to(strong_RD)).float().div_(temperature).log_softmax(dim=-1)
        logits_RV = project(strong_RD).float()
        within_RV = self._within(logits_RV, source, step)
        logits_RV.div_(temperature)
        if torch.count_nonzero(within_RV) > within_RV.numel() / MANY:
            mixed_RV = project(mixed_RD.to(strong_RD)).float().div_(temperature)
            return torch.where(within_RV, mixed_RV, logits_RV.sub_(PENALTY)).log_softmax(dim=-1)
        row_N, token_N = within_RV.nonzero().unbind(1)
        weight_ND = self.single_model.decoder.output_projection.weight[token_N]
        mixed_N = (weight_ND.float() * mixed_RD[row_N]).sum(dim=1) / temperature
        sum_R = log_sum_exp(mixed_N, row_N, len(mixed_RD))
        log_probs_RV = logits_RV.sub_((sum_R + PENALTY).unsqueeze(1))
        return log_probs_RV.index_put_((row_N, token_N), mixed_N - sum_R[row_N])

    def _within(self, logits_RV, source, step):
        """(R, V) bool, the tokens in V_valid. Makes others -inf in the strong view's logits that
        the search does not take by itself. The temperature does not matter for it."""
        logits_RV[:, self.limits.never.to(logits_RV.device)] = -math.inf
        if step < self.limits.min_len:
            logits_RV[:, self.eos] = -math.inf
        within_RV = logits_RV >= logits_RV.amax(dim=1, keepdim=True) + math.log(self.alpha)
        for tokens_BN in self._forced_at(source, step):
            within_RV.scatter_(1, tokens_BN.repeat_interleave(self.beam, dim=0), True)
        within_RV[:, self.pad] = False  # what forced tokens are padded with
        return within_RV

    def _forced_at(self, source, step):
        """(B, N) tokens that the search may have to take, whatever their probability."""
        if source.forced:
            begin_BP, contained_BC = source.forced
            yield from (begin_BP[:, step : step + 1], contained_BC)


def log_sum_exp(values_N, row_N, num_rows):
    """(R,) logarithm of the sum of exponentials of each row's values."""
    most_R = values_N.new_full((num_rows,), -math.inf).scatter_reduce(0, row_N, values_N, "amax")
    shares_N = (values_N - most_R[row_N]).exp()
    return most_R + values_N.new_zeros(num_rows).index_add(0, row_N, shares_N).log()


def _every_second(rows):
    return rows[::2]
