"""Sizes of the real models against those that the paper prints."""

import pytest

from fairseq_smoe.accounting.flops import count_row
from fairseq_smoe.benchmarks import benchmark as benchmarks

# rows whose printed FLOPs do not follow from the paper's own counting rule (343M and 808M do)
PRINTED_FLOPS_DIFFER = {"Stacking 4 2-expert MoE"}

ROWS = [
    pytest.param(benchmark, row, id=f"{benchmark.name}: {row.name}")
    for benchmark in (benchmarks.load("m4"), benchmarks.load("m15"))
    for row in benchmark.rows
]


def printed_range(text):
    """What may have been cut off: "148M" stands for 148 to 149 million."""
    number, unit = text[:-1], {"M": 1e6, "B": 1e9}[text[-1]]
    last_digit = 10 ** -len(number.partition(".")[2])
    return float(number) * unit, (float(number) + last_digit) * unit


@pytest.mark.parametrize("benchmark, row", ROWS)
def test_size_of_row(benchmark, row):
    params, flops = count_row(benchmark, row)
    low, high = printed_range(row.params)
    assert low * 0.995 <= params <= max(high, low * 1.005)
    dense_row = benchmark.rows[0]
    _, dense_flops = count_row(benchmark, dense_row)
    if row.name not in PRINTED_FLOPS_DIFFER:
        assert flops / dense_flops == pytest.approx(row.mflops / dense_row.mflops, rel=0.01)
