"""Printed sentences have the user's words alone: without the language tokens that the task adds."""

from functools import wraps

from fairseq.sequence_scorer import SequenceScorer


def show_words_alone(task):
    """Hide the language tokens from fairseq's programs, which print and count what a task returns.

    --prefix-size then counts words. Sources (S-), targets (T-), hypotheses (H-, D-), scores of
    tokens (P-) and alignments (A-) have no language tokens. The search has scored the token, so
    the score of a hypothesis, by which it is ranked, still includes it. The score of a reference
    (--score-reference) does not. --keep-inference-langtok shows everything.
    """
    stock = task.inference_step
    keep = getattr(task.args, "keep_inference_langtok", False)

    @wraps(stock)
    def inference_step(generator, models, sample, prefix_tokens=None, constraints=None):
        tokens = task.language_tokens
        if prefix_tokens is not None and tokens.target is not None:
            # what fairseq has taken begins with the language token
            prefix_tokens = sample["target"][:, 1 : 1 + prefix_tokens.size(1)]
        found = stock(generator, models, sample, prefix_tokens, constraints)
        if keep:
            return found
        if tokens.source is not None:
            pad = task.source_dictionary.pad()
            hide(sample["net_input"]["src_tokens"], tokens.source, pad, tokens.replacing)
        of_reference = isinstance(generator, SequenceScorer)
        for hypothesis in (hypothesis for hypotheses in found for hypothesis in hypotheses):
            # that of a source without words has no language token
            if hypothesis["tokens"][0] == tokens.target:
                without_first_score(hypothesis)
                if of_reference:
                    without_first_token(hypothesis, tokens.in_source)
        return found

    task.inference_step = inference_step


def hide(tokens_BS, token, pad, at_end=False):
    """Replace the language token of every sentence by padding, which is not printed, in place.

    Args:
        tokens_BS: token indices, padded on either side.
        token: what the sentences begin with.
        at_end: or end with.
    """
    words = tokens_BS.ne(pad).int()
    position_B = words.argmax(1)
    if at_end:
        position_B = words.size(1) - 1 - words.flip(1).argmax(1)
    first_B1 = tokens_BS.gather(1, position_B.unsqueeze(1))
    tokens_BS.scatter_(1, position_B.unsqueeze(1), first_B1.masked_fill(first_B1 == token, pad))


def without_first_score(hypothesis):
    """Take the language token out of a hypothesis' scores of tokens."""
    hypothesis["positional_scores"] = hypothesis["positional_scores"][1:]


def without_first_token(hypothesis, in_source):
    """Take the language token out of a scored reference: its tokens, mean and alignment.

    Args:
        in_source: number of language tokens in front of the source.
    """
    hypothesis["tokens"] = hypothesis["tokens"][1:]
    hypothesis["score"] = hypothesis["positional_scores"].mean()
    if hypothesis["alignment"]:
        hypothesis["alignment"] = [
            (source - in_source, target - 1)
            for source, target in hypothesis["alignment"]
            if source >= in_source and target >= 1
        ]
