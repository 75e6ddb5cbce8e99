"""Text that is longer than a model takes, in parts that are not."""

import re

LONG_TEXT = ("split", "shorten", "refuse")  # what to do with it

# behind the end of a sentence, whatever quotes or brackets follow it
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？।])[\"'»”’)\]]*\s+|(?<=[。！？])")


def split_text(text, fits):
    """Split text at the ends of sentences, and where a sentence is too long, between words.

    Args:
        fits: ``fits(text)`` says whether the model takes it.

    Returns:
        list of parts that fit, as long as possible. A word that is too long by itself is a part.
    """
    parts = []
    for sentence in _split_at(_SENTENCE_END, text):
        parts += [sentence] if fits(sentence) else _join(sentence.split(), fits)
    return _join(parts, fits)


def _split_at(pattern, text):
    ends = [match.end() for match in pattern.finditer(text)]
    starts = [0, *ends]
    found = [text[start:end].strip() for start, end in zip(starts, [*ends, len(text)])]
    return [part for part in found if part]


def _join(parts, fits):
    """Join neighbours with a space as long as they fit together."""
    joined = []
    for part in parts:
        together = f"{joined[-1]} {part}" if joined else part
        if joined and fits(together):
            joined[-1] = together
        else:
            joined.append(part)
    return joined
