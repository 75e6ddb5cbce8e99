"""Hidden sizes of experts of different widths: as listed by the user, or by a schedule."""

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import format_strata

UNIT = 8  # sizes of a schedule are multiples of it

# size of expert i of n relative to the others; for 8 experts these are the paper's (HMoE, section
# 4.1): 9, 11, ... 23; 1, 2, 4, ... 128; and 1, 1, 1, 1, 2, 2, 4, 4
SCHEDULES = {
    "arithmetic": lambda i, n: 9 + 14 * i / max(n - 1, 1),
    "geometric": lambda i, n: 2.0**i,
    "hybrid": lambda i, n: (1, 1, 2, 4)[4 * i // n],
}


def read_widths(text, strata):
    """Read the sizes of all experts, e.g. ``"64,192/128"`` for strata 2-3.

    Args:
        text: sizes joined by commas, strata by slashes. A single size holds for all experts of its
            stratum.
        strata: experts of each stratum.

    Returns:
        A list with the size of every expert.

    Raises:
        OptionError: the text does not parse, or does not fit the strata.
    """
    lists = [part.split(",") for part in str(text).split("/")]
    sizes = [size for part in lists for size in part]
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise OptionError(
            f"--moe-ffn-dims {text}: expected numbers of hidden units, 1 or more, joined by "
            "commas, and by slashes between strata, as in 64,192/128,384"
        )
    full = [part * size if len(part) == 1 else part for part, size in zip(lists, strata)]
    if len(lists) != len(strata) or any(len(f) != size for f, size in zip(full, strata)):
        raise OptionError(
            f"--moe-ffn-dims {text}: does not fit the strata {format_strata(strata)}; expected "
            f"{len(strata)} lists joined by slashes, of {', '.join(map(str, strata))} numbers, or "
            "of one number for all experts of the stratum"
        )
    return [int(size) for part in full for size in part]


def scheduled_widths(schedule, num_experts, ffn_dim):
    """Sizes that grow from expert to expert in the proportions of a schedule.

    They are multiples of 8, at least 8, and add up to exactly ``num_experts * ffn_dim``.

    Args:
        schedule: a name in ``SCHEDULES``.
        num_experts: experts that the schedule is for.
        ffn_dim: their mean size.

    Returns:
        A list with the size of every expert.

    Raises:
        OptionError: there are no such multiples.
    """
    units, rest = divmod(num_experts * ffn_dim, UNIT)
    if rest or units < num_experts:
        raise OptionError(
            f"--moe-size-schedule {schedule}: {num_experts} experts of {ffn_dim} hidden units "
            f"cannot be divided into multiples of {UNIT}; change the hidden size, or list the "
            "sizes with --moe-ffn-dims"
        )
    relative = [SCHEDULES[schedule](i, num_experts) for i in range(num_experts)]
    ideal = [units * r / sum(relative) for r in relative]
    taken = [max(1, int(share)) for share in ideal]
    while sum(taken) != units:  # the expert furthest from its share takes or gives a unit
        step = 1 if sum(taken) < units else -1
        able = [e for e in range(num_experts) if taken[e] + step >= 1]
        furthest = max(able, key=lambda e: step * (ideal[e] - taken[e]))
        taken[furthest] += step
    return [UNIT * n for n in taken]
