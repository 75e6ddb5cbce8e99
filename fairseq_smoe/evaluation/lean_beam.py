"""fairseq's beam search without work whose results are not used."""

import math

import torch
from fairseq.search import BeamSearch
from fairseq.sequence_generator import EnsembleModel

from fairseq_smoe.evaluation.step_decoder import StepDecoder, can_step

STATE = "step"  # in fairseq's incremental state


def make_lean(generator, models):
    """Let a fairseq ``SequenceGenerator`` that needs no word alignment translate faster.

    Args:
        models: that it translates with.
    """
    generator.model = LeanBeamModel(models)
    generator.model.set_decoder_beam_size(generator.beam_size)
    if type(generator.search) is BeamSearch:
        generator.search = LeanBeamSearch(generator.tgt_dict)


class LeanBeamModel(EnsembleModel):
    """A model for ``SequenceGenerator``, for translations without word alignment.

    The hypotheses are those of :class:`EnsembleModel`. For alignments, fairseq's generator keeps
    the attention of every hypothesis over the source, and reorders it at every step. It also
    reorders the encoder's output by beam, although all beams of a sentence have the same one.
    Decoders are run by :class:`StepDecoder` if they have no parts that it does not know.
    """

    def __init__(self, models):
        super().__init__(models)
        self._beam = 1
        self._steps = None
        if all(can_step(model.decoder) for model in models):
            self._steps = [StepDecoder(model.decoder) for model in models]

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """Log probabilities of the next token, and None for the attention."""
        if self._steps is None:
            log_probs, _ = super().forward_decoder(
                tokens, encoder_outs, incremental_states, temperature
            )
            return log_probs, None
        found = []
        for step, out, states in zip(self._steps, encoder_outs, incremental_states):
            if STATE not in states:
                states[STATE] = step.start(out, self._beam)
            found.append(step.step(tokens, states[STATE], temperature))
        if len(found) == 1:
            return found[0], None
        return torch.logsumexp(torch.stack(found), dim=0) - math.log(len(found)), None

    def reorder_incremental_state(self, incremental_states, new_order):
        if self._steps is None:
            super().reorder_incremental_state(incremental_states, new_order)
        for states in incremental_states if self._steps else ():
            states[STATE].reorder(new_order)

    def reorder_encoder_out(self, encoder_outs, new_order):
        """Encoder states (S, B, D) of the rows ``new_order``. They only change when a sentence is
        finished: until then the rows are of the same sentences in the same order."""
        rows = encoder_outs[0]["encoder_out"][0].size(1)
        if rows == len(new_order):
            return encoder_outs
        return super().reorder_encoder_out(encoder_outs, new_order)

    def set_decoder_beam_size(self, beam_size):
        """Let the beams of a sentence share the keys and values of the attention to the source.
        fairseq intends this, but calls the method on the model, and only the decoder has it."""
        self._beam = beam_size
        for model in self.models:
            model.decoder.set_beam_size(beam_size)


class LeanBeamSearch(BeamSearch):
    """Adds a hypothesis' score to the log probabilities of its next tokens in their own memory:
    new memory for so many numbers takes longer than adding them."""

    def step(self, step, lprobs, scores, *_unused, candidate_multiple=2):
        """The best candidates of each sentence. Arguments and results are those of
        ``BeamSearch``; ``lprobs``, (B, beam, V), becomes the sum."""
        beam, vocabulary = lprobs.shape[1:]
        if step == 0:
            lprobs = lprobs[:, :1]  # all rows of a sentence are the same
        else:
            lprobs.add_(scores[:, :, step - 1].unsqueeze(-1))
        all_BN = lprobs.flatten(1)
        # all but one: the padding is never chosen
        number = min(candidate_multiple * beam, all_BN.size(1) - 1)
        best_BK, index_BK = all_BN.topk(number)
        return best_BK, index_BK % vocabulary, index_BK // vocabulary
