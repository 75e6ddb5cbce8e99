"""Stratum layouts in the paper's notation: ``4-4-8`` is three strata of 4, 4 and 8 experts."""

from fairseq_smoe.errors import OptionError


def parse_strata(text, flag="--smoe-strata"):
    """Read a stratum layout.

    Args:
        text: sizes joined by hyphens, e.g. ``"4-4-8"``; a single number is one stratum.
        flag: that gives it.

    Returns:
        Tuple of positive ints.

    Raises:
        OptionError: the text does not parse, or a stratum has no expert.
    """
    sizes = str(text).split("-")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise OptionError(
            f"{flag} {text!r}: expected the number of experts of each stratum, "
            "1 or more, joined by hyphens, as in 4-4-8"
        )
    return tuple(int(size) for size in sizes)


def format_strata(strata):
    """The inverse of :func:`parse_strata`: ``(4, 4, 8)`` -> ``"4-4-8"``."""
    return "-".join(map(str, strata))


def split_strata(strata, split):
    """The strata if ``split`` smaller experts replace every one: ``(4, 4)`` -> ``(8, 8)``."""
    return tuple(size * split for size in strata)


def split_width(width, split):
    """The hidden size of each of ``split`` experts that replace one of size ``width``.

    Raises:
        OptionError: ``split`` does not divide the width.
    """
    if width % split:
        raise OptionError(
            f"--moe-ffn-split {split}: does not divide the hidden size of the experts, {width}; "
            "expected a divisor of it"
        )
    return width // split


def visible_experts(strata):
    """Which experts each gate sees: its own stratum and all later ones (paper, section 3.1).

    Returns:
        One ``range`` of expert indices per stratum; all of them end at the last expert.
    """
    total = sum(strata)
    return [range(sum(strata[:i]), total) for i in range(len(strata))]


def own_experts(strata):
    """The experts of each stratum itself, one ``range`` per stratum."""
    return [range(sum(strata[:i]), sum(strata[: i + 1])) for i in range(len(strata))]


def visit_probabilities(strata):
    """Probability that a token visits each gate, if every gate chooses its best expert uniformly.

    Of the strata from i on, some stratum is the first that a token's best expert comes from. The
    token visits gate i + 1 if that is stratum i. The probabilities add up to
    :func:`mean_requested_capacity`.
    """
    return [1.0, *(size / sum(strata[i:]) for i, size in enumerate(strata[:-1]))]
