"""The initial values of the factors of the passes' outputs."""

import math

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import format_strata


def parse_pass_scale(text, strata):
    """Read ``--smoe-pass-scale``.

    Args:
        text: a number for all passes, or one for each stratum, joined by commas, e.g. ``"1,0"``;
            None for no factors.
        strata: experts of each stratum.

    Returns:
        Tuple of floats, one for each stratum; or None.

    Raises:
        OptionError: the text does not parse, or has another number of numbers.
    """
    if text is None:
        return None
    try:
        numbers = [float(number) for number in str(text).split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, len(strata)):
        raise OptionError(
            f"--smoe-pass-scale {text}: expected one number, or one for each of the {len(strata)} "
            f"strata {format_strata(strata)}, joined by commas, e.g. "
            f"{','.join(['1'] + ['0'] * (len(strata) - 1))}"
        )
    return tuple(numbers * (len(strata) // len(numbers)))
