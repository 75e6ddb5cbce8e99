"""Stratum layouts and what follows from them by counting."""

import random

import pytest

from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import (
    format_strata,
    own_experts,
    parse_strata,
    visible_experts,
    visit_probabilities,
)


@pytest.mark.parametrize("text, strata", [("8", (8,)), ("4-4-8", (4, 4, 8)), ("1-1", (1, 1))])
def test_parse(text, strata):
    assert parse_strata(text) == strata
    assert format_strata(strata) == text


@pytest.mark.parametrize("text", ["", "4-", "-4", "4-0", "4,4", "four", "4--4", "4.5", "٤-4"])
def test_parse_refuses(text):
    with pytest.raises(OptionError, match="--smoe-strata.*4-4-8"):
        parse_strata(text)


def test_experts_of_gates():
    assert visible_experts((4, 4, 8)) == [range(0, 16), range(4, 16), range(8, 16)]
    assert own_experts((4, 4, 8)) == [range(0, 4), range(4, 8), range(8, 16)]


@pytest.mark.parametrize(
    "text, capacity",
    [
        ("8", 1),
        ("4-12", 1.25),
        ("12-4", 1.75),
        ("4-4", 1.5),
        ("4-4-8", 1.583),
        ("8-4-4", 2.0),
        ("2-2-2-2", 2.083),
    ],
)
def test_mean_requested_capacity(text, capacity):
    assert sum(visit_probabilities(parse_strata(text))) == pytest.approx(capacity, abs=5e-4)


def test_mean_requested_capacity_by_simulation():
    strata, rng, passes, tokens = (3, 1, 2), random.Random(0), 0, 20000
    for _ in range(tokens):
        at = 0
        while at < len(strata):
            best = rng.randrange(sum(strata[:at]), sum(strata))
            at = next(i for i, experts in enumerate(own_experts(strata)) if best in experts) + 1
            passes += 1
    assert sum(visit_probabilities(strata)) == pytest.approx(passes / tokens, rel=0.02)
