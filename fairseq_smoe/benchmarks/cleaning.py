"""Which pairs of training sentences are dropped: a part of what a benchmark is.

The paper's benchmarks drop nothing that was published but pairs with an empty side
(``"clean": "none"``); text of one's own is cleaned by default.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Rules:
    """The rules for dropping pairs; lengths in characters, 0 for no limit."""

    invalid_utf8: str = "error"
    empty: str = "drop"
    identical: str = "drop"
    max_length: int = 1000
    max_length_ratio: float = 9.0
    held_out: str = "drop"
    duplicates: str = "drop"


CLEANINGS = {
    "none": Rules(
        identical="keep",
        max_length=0,
        max_length_ratio=0,
        held_out="keep",
        duplicates="keep",
    ),
    "default": Rules(),
}


def rules_of(clean):
    """``(name of the cleaning, rules)`` of the entry ``clean`` of a benchmark.

    Args:
        clean: a name in ``CLEANINGS``, or ``{rule: value}`` that replaces some of the default's.

    Raises:
        ValueError: says what is wrong.
    """
    if isinstance(clean, str) and clean in CLEANINGS:
        return clean, CLEANINGS[clean]
    if not isinstance(clean, dict):
        raise ValueError(f"clean {clean}: expected {' or '.join(CLEANINGS)}, or {{rule: value}}")
    for name, value in clean.items():
        _check_rule(name, value)
    return "default", replace(Rules(), **clean)


def _check_rule(name, value):
    rules = asdict(Rules())
    if name not in rules:
        raise ValueError(f"clean: {name} is none of {', '.join(rules)}")
    if isinstance(rules[name], str):
        choices = ("error", "drop") if name == "invalid_utf8" else ("drop", "keep")
        if value not in choices:
            raise ValueError(f"clean {name} {value}: expected {' or '.join(choices)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"clean {name} {value}: expected a number from 0")


def in_words(cleaning, rules):
    """``"none"``, or ``"default with --max-length 500"``.

    Args:
        cleaning: the name in ``CLEANINGS`` that was chosen.
        rules: ``{rule: value}`` that then were applied. Those left out are the cleaning's.
    """
    usual = asdict(CLEANINGS[cleaning])
    # lines that are not UTF-8 concern all splits, and are no part of cleaning
    changed = [
        f"--{name.replace('_', '-')} {rules[name]}"
        for name in usual
        if name != "invalid_utf8" and rules.get(name, usual[name]) != usual[name]
    ]
    return f"{cleaning} with {' '.join(changed)}" if changed else cleaning


def recorded_cleaning(data):
    """:func:`in_words`, of a folder that ``prepare`` has made; None for other folders."""
    try:
        steps = json.loads((Path(data) / "steps.json").read_text(encoding="utf-8"))
        options = steps["clean"]["options"]
        names = {field.name for field in fields(Rules)}
        rules = {name: value for name, value in options.items() if name in names}
        # records without the name are older than the choice
        return in_words(options.get("cleaning", "default"), rules)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
