"""The benchmark of the systems of docs/systems.md."""

import pytest

from fairseq_smoe.accounting.flops import count_row
from fairseq_smoe.benchmarks import benchmark as benchmarks

FAMILY = benchmarks.load("family")
SYSTEMS = [row.slug for row in FAMILY.rows if row.slug not in ("dense", "mpoe")]


@pytest.mark.parametrize("scale, close", [("paper", 0.002), ("small", 0.007)])
def test_rows_have_the_parameters_of_the_vanilla_moe(scale, close):
    vanilla, flops, _ = count_row(FAMILY, FAMILY.row("vanilla-moe"), scale)
    for name in SYSTEMS:
        assert count_row(FAMILY, FAMILY.row(name), scale)[0] == pytest.approx(vanilla, rel=close)
    _, of_mpoe, to_rebuild = count_row(FAMILY, FAMILY.row("mpoe"), scale)
    assert of_mpoe == pytest.approx(flops, rel=close) and to_rebuild > 0


def test_the_data_are_those_of_m4():
    m4 = benchmarks.load("m4")
    for entry in ("splits", "languages", "vocab_size", "temperature", "clean", "training"):
        assert getattr(FAMILY, entry) == getattr(m4, entry)
