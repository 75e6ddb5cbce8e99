"""How many small experts a feed-forward network is split into, and how many of them a token keeps
(MoEfication)."""

import math

from fairseq_smoe.errors import OptionError

SELECT = ("mlp", "similarity", "oracle")
USUAL_WIDTH = 32  # hidden units of a small expert


def number_kept(text, num_experts):
    """How many small experts a row keeps.

    Args:
        text: value of ``--moefy-k``: a number, 0 for all, or a percentage such as ``25%``.

    Raises:
        OptionError: it is none of these.
    """
    text = str(text)
    digits = text.removesuffix("%")
    number = int(digits) if digits.isascii() and digits.isdigit() else -1
    if text.endswith("%") and 0 < number <= 100:
        return max(1, round(num_experts * number / 100))
    if not text.endswith("%") and 0 <= number <= num_experts:
        return number or num_experts
    raise OptionError(
        f"--moefy-k {text}: expected a number of experts up to --moefy-experts {num_experts}, 0 "
        "for all, or a percentage from 1% to 100%"
    )


def check_split(num_experts, ffn_dim):
    """Raises:
    OptionError: hidden units cannot be divided equally among the small experts.
    """
    if ffn_dim % num_experts == 0:
        return
    divisors = [n for n in range(1, ffn_dim + 1) if ffn_dim % n == 0]
    below = max(n for n in divisors if n < num_experts)
    above = min((n for n in divisors if n > num_experts), default=None)
    nearest = f"{below}" if above is None else f"{below} or {above}"
    raise OptionError(
        f"--moefy-experts {num_experts}: does not divide the {ffn_dim} hidden units of an FFN; "
        f"the nearest that does is {nearest}"
    )


def usual_number(ffn_dims):
    """The number of small experts for networks of these hidden sizes: that which divides all of
    them and comes closest to :data:`USUAL_WIDTH` hidden units each, in the largest."""
    common, wanted = math.gcd(*ffn_dims), max(ffn_dims) / USUAL_WIDTH
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / wanted)))
