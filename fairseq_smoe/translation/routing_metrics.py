"""Routing statistics that training logs: numbers per batch, averaged by fairseq's loggers.

Every number is an average over *all* gates, of all expert layers, that saw tokens.
"""

import math

import torch

# fairseq's progress line, JSON log and TensorBoard show these under their names
GATE_METRICS = (
    "overflow_expert1",  # percent of first choices that found their expert full
    "overflow_expert2",  # percent of all other choices that did
    "entropy_gating",  # nats; log(E) when a gate does not distinguish its E experts
    "expert1_balance_top",  # percent of first choices on the most loaded fifth of the experts
    "expert1_balance_bottom",  # percent of first choices on the least loaded fifth
    "unused_expert1_count",  # experts that were no token's first choice
)


def gate_metrics(record):
    """The :data:`GATE_METRICS` of one gate.

    Args:
        record: :class:`~fairseq_smoe.moe.block.GateRecord`

    Returns:
        (6,) float32 without gradient; zeros if the gate saw no token. The host does not wait for
        the device.
    """
    scores_TE, first_T = record.scores_TE.float(), record.best_T
    num_tokens, num_experts = scores_TE.shape
    here_T = scores_TE.new_ones(num_tokens) if record.here_T is None else record.here_T.float()
    num_here = here_T.sum()
    share_T = here_T / num_here.clamp(min=1)
    percent_E = scores_TE.new_zeros(num_experts).index_add(0, first_T, 100 * share_T)
    percent_E = percent_E.sort(descending=True).values
    fifth = math.ceil(num_experts / 5)
    overflow = [scores_TE.new_zeros(())] * 2
    if record.kept_C is not None:
        is_first_C = record.expert_C == first_T[record.token_C]
        here_C = here_T[record.token_C]
        overflow = [
            _percent(here_C * rank_C, record.kept_C.logical_not())
            for rank_C in (is_first_C, is_first_C.logical_not())
        ]
    return (num_here > 0) * torch.stack(
        [
            *overflow,
            (torch.special.entr(scores_TE).sum(dim=1) * share_T).sum(),
            percent_E[:fifth].sum(),
            percent_E[-fifth:].sum(),
            (percent_E == 0).sum().float(),
        ]
    )


def _percent(of_C, which_C):
    """Percent of the choices ``of_C`` (weights) that are ``which_C``; 0 if there are none."""
    return 100 * (of_C * which_C).sum() / of_C.sum().clamp(min=1)


def routing_metrics(stats_by_layer):
    """Sums and counts of one batch, ready to be added over batches and processes.

    Args:
        stats_by_layer: ``{layer name: BlockStats}``; names start with ``encoder.`` or ``decoder.``

    Returns:
        dict of tensors and numbers: ``routing_gates`` (number of gates that saw tokens), for each
        name in :data:`GATE_METRICS` the sum over those gates, and for both sides ``<side>_passes``
        (sum of requested capacity), ``<side>_routed`` (number of tokens or, if they are split, of
        their heads, times number of layers), ``<side>_visits`` (visits of experts) and
        ``<side>_tokens`` (number of tokens times number of layers).
    """
    gates = [record for stats in stats_by_layer.values() for record in stats.gates]
    sums = sum((gate_metrics(record) for record in gates), torch.zeros(()))
    seen = sum(torch.as_tensor(record.num_tokens) > 0 for record in gates)
    result = {"routing_gates": seen, **dict(zip(GATE_METRICS, sums.unbind()))}
    for side in ("encoder", "decoder"):
        layers = [s for name, s in stats_by_layer.items() if side in name.split(".")]
        routed = [s.passes.gt(0).sum().float() for s in layers]
        visits = [gate.num_visits.float() for s in layers for gate in s.gates]
        for name, numbers in (
            ("passes", [s.passes.sum().float() for s in layers]),
            ("routed", routed),
            ("visits", visits),
            ("tokens", [number / s.heads for number, s in zip(routed, layers)]),
        ):
            result[f"{side}_{name}"] = sum(numbers, torch.zeros(()))
    return result
