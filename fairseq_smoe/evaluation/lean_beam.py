"""fairseq's beam search without the work that nobody reads the results of."""

from fairseq.sequence_generator import EnsembleModel


class LeanBeamModel(EnsembleModel):
    """What a ``SequenceGenerator`` asks of a model, for translations without word alignment.

    The hypotheses are those of :class:`EnsembleModel`. fairseq's generator keeps the attention of
    every hypothesis over the source at every step, and sorts it anew each time, for alignments;
    and sorts the encoder's output by beam, though the beams of a sentence have the same.
    """

    def forward_decoder(self, *args, **kwargs):
        """Log probabilities of the next token, and None for the attention."""
        log_probs, _ = super().forward_decoder(*args, **kwargs)
        return log_probs, None

    def reorder_encoder_out(self, encoder_outs, new_order):
        """(S, B, D) states of the encoder for the rows ``new_order``; the rows that go on are of
        the same sentences in the same order unless a sentence is finished and leaves."""
        rows = encoder_outs[0]["encoder_out"][0].size(1)
        if rows == len(new_order):
            return encoder_outs
        return super().reorder_encoder_out(encoder_outs, new_order)

    def set_decoder_beam_size(self, beam_size):
        """Let the beams of a sentence share the keys and values of their attention to the source.
        fairseq means to, but looks for the method at the model, where only the decoder has it."""
        for model in self.models:
            model.decoder.set_beam_size(beam_size)
