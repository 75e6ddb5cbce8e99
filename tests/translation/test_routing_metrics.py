"""The logged routing numbers, by hand on small routings."""

import math
from dataclasses import replace

import pytest
import torch

from fairseq_smoe.moe.block import BlockStats, GateRecord, SMoEBlock
from fairseq_smoe.moe.gate import Choices
from fairseq_smoe.translation.routing_metrics import GATE_METRICS, gate_metrics, routing_metrics


def record(first, second, num_experts, kept=None, scores=None):
    if scores is None:
        scores = torch.full((len(first), num_experts), 1 / num_experts)
    kept = None if kept is None else torch.tensor(kept).flatten()
    return GateRecord.of(Choices.ranked(scores, torch.tensor([first, second])), kept)


def test_gate_metrics_by_hand():
    kept = [[True, True, True, False], [False, False, True, True]]
    metrics = dict(
        zip(GATE_METRICS, gate_metrics(record([0, 0, 0, 1], [1, 2, 3, 3], 10, kept)).tolist())
    )
    assert metrics == pytest.approx(
        {
            "overflow_expert1": 25,
            "overflow_expert2": 50,
            "entropy_gating": math.log(10),
            "expert1_balance_top": 100,  # the two busiest of ten
            "expert1_balance_bottom": 0,
            "unused_expert1_count": 8,
        },
        abs=1e-5,
    )


def test_a_sure_gate_has_no_entropy():
    scores = torch.eye(3)
    metrics = gate_metrics(record([0, 1, 2], [1, 2, 0], 3, scores=scores))
    assert metrics[GATE_METRICS.index("entropy_gating")] == 0


def test_all_strata_count_and_empty_gates_do_not():
    torch.manual_seed(0)
    block = SMoEBlock(8, 8, (2, 2)).train()
    with torch.no_grad():  # the best expert is always the last one: nobody reaches gate 2
        block.norms[0].bias.fill_(10)
        block.gates[0].weight.copy_(torch.tensor([0.0, 0, 0, 1]).unsqueeze(1).expand(4, 8))
    _, stats = block(torch.randn(20, 8))
    empty = routing_metrics({"encoder.layers.1": stats})
    assert empty["routing_gates"] == 1
    assert empty["encoder_passes"] == empty["encoder_routed"] == 20
    assert empty["decoder_routed"] == 0

    with torch.no_grad():  # now always the first one: all go on to gate 2
        block.gates[0].weight.copy_(block.gates[0].weight.flip(0))
    mask = torch.arange(20) >= 15
    _, stats = block(torch.randn(20, 8), mask)
    full = routing_metrics({"decoder.layers.1": stats, "encoder.layers.1": stats})
    assert full["routing_gates"] == 4
    assert full["decoder_passes"] == full["encoder_passes"] == 30
    assert full["decoder_routed"] == 15
    by_hand = sum(gate_metrics(gate) for gate in stats.gates) * 2
    torch.testing.assert_close(torch.stack([full[name] for name in GATE_METRICS]), by_hand)


def test_visits_of_experts():
    """Those of tokens at the gate that were not dropped; per token, not per head of it."""
    kept = [[True, True, True, False], [False, False, True, True]]
    whole = record([0, 0, 0, 1], [1, 2, 3, 3], 10, kept)
    assert whole.num_visits == 5
    here = replace(whole, here_T=torch.tensor([True, True, False, True]))
    assert here.num_visits == 3
    assert record([0, 1], [1, 2], 3).num_visits == 4
    stats = BlockStats({}, torch.ones(2, 2, dtype=torch.long), [whole, here], {}, heads=2)
    sums = routing_metrics({"encoder.layers.1": stats})
    assert (sums["encoder_visits"], sums["encoder_tokens"], sums["encoder_routed"]) == (8, 2, 4)


def test_no_tokens_at_all():
    block = SMoEBlock(8, 8, (2, 2))
    _, stats = block(torch.randn(3, 8), torch.ones(3, dtype=torch.bool))
    assert isinstance(stats, BlockStats)
    assert routing_metrics({"encoder.layers.1": stats})["routing_gates"] == 0
