"""Dividing sentences among ranks."""

import heapq

from fairseq_smoe.evaluation.batches import in_batches

UNITS = 4  # at least so many for each rank, so that the last ones to end are nearly equal


def divide(sizes, tokens, ranks, whole_batches=False):
    """Shares of about as many tokens, with padding.

    Sentences of similar length of one test set are a unit, and are translated together: a batch as
    one process would have it, or an equal part of one if there are few.

    Args:
        sizes: ``{job: {index: source tokens}}`` of sentences to translate.
        tokens: source tokens of a batch, at most.
        ranks: their number.
        whole_batches: never take equal parts of a batch. Has to be if translations depend on the
            batch: with --max-len-a, fairseq's limit of their length is that of the batch.

    Returns:
        ``[[(job, indices), ...], ...]``, a list for each rank, in the order of the jobs.
    """
    batches = []
    for job, own in sizes.items():
        indices = list(own)
        for batch in in_batches(list(own.values()), tokens):
            longest = own[indices[batch[0]]]
            batches.append((longest, job, [indices[i] for i in batch]))
    total = sum(longest * len(batch) for longest, _, batch in batches)
    most = max(1, total / (UNITS * ranks))
    units = []
    for longest, job, batch in batches:
        parts = min(len(batch), max(1, round(longest * len(batch) / most)))
        parts = 1 if whole_batches else parts
        for i in range(parts):
            part = batch[len(batch) * i // parts : len(batch) * (i + 1) // parts]
            units.append((sizes[job][part[0]] * len(part), len(units), job, part))
    loads = [(0, rank) for rank in range(ranks)]
    shares = [[] for _ in range(ranks)]
    for cost, number, job, part in sorted(units, key=lambda unit: -unit[0]):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost, rank))
        shares[rank].append((number, job, part))
    return [[unit[1:] for unit in sorted(share, key=lambda unit: unit[0])] for share in shares]
