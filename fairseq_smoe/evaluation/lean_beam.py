"""fairseq's beam search without work whose results are not used."""

from fairseq.sequence_generator import EnsembleModel


class LeanBeamModel(EnsembleModel):
    """A model for ``SequenceGenerator``, for translations without word alignment.

    The hypotheses are those of :class:`EnsembleModel`. For alignments, fairseq's generator keeps
    the attention of every hypothesis over the source, and reorders it at every step. It also
    reorders the encoder's output by beam, although all beams of a sentence have the same one.
    """

    def forward_decoder(self, *args, **kwargs):
        """Log probabilities of the next token, and None for the attention."""
        log_probs, _ = super().forward_decoder(*args, **kwargs)
        return log_probs, None

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
        for model in self.models:
            model.decoder.set_beam_size(beam_size)
