"""The step ``clean``: small pairs in a job each, large ones in pieces."""

import shutil

from fairseq_smoe.preparation.clean import clean_pair, finish_pair, read_counts
from fairseq_smoe.preparation.large_pairs import (
    LargePair,
    buckets_of,
    find_repeated,
    is_large,
    join_pieces,
    judge_piece,
    write_piece,
)


def clean_pairs(plan, pool, found, verified):
    """Clean all pairs.

    Args:
        found, verified: summaries of the steps fetch and verify.

    Returns:
        ``{pair: {split: counts}}``, the pairs with most text first.
    """

    def size(pair):
        return max(verified[f"train.{pair}.{lang}"][0] for lang in pair.split("-"))

    counts = {pair: read_counts(pair, plan.clean) for pair in sorted(found, key=size, reverse=True)}
    waiting = [pair for pair, known in counts.items() if known is None]
    large = [pair for pair in waiting if is_large(size(pair), plan.piece_lines)]
    counts |= clean_large_pairs(
        [LargePair(pair, plan.raw, plan.clean, plan.piece_lines) for pair in large],
        plan.rules,
        found,
        pool,
    )
    small = [pair for pair in waiting if pair not in large]
    jobs = [(pair, plan.raw, plan.clean, found[pair], plan.rules) for pair in small]
    counts |= zip(small, pool.map(clean_pair, jobs, "clean", "pair"))
    return counts


def clean_large_pairs(large, rules, found, pool):
    """As :func:`clean_pairs`, for a list of :class:`LargePair`."""
    if not large:
        return {}
    cuts = pool.map(LargePair.cut, [(pair,) for pair in large], "measure", "pair")
    cut = list(zip(large, cuts))
    buckets = dict.fromkeys(large, 0)
    if rules.duplicates == "drop":
        buckets = {pair: buckets_of(pieces) for pair, pieces in cut}
    pieces_of_all = [(pair, piece) for pair, pieces in cut for piece in pieces]
    jobs = [(pair, piece, rules, buckets[pair]) for pair, piece in pieces_of_all]
    pool.map(judge_piece, jobs, "clean", "piece")
    jobs = [(*of_pair, bucket) for of_pair in cut for bucket in range(buckets[of_pair[0]])]
    pool.map(find_repeated, jobs, "find duplicates", "part")
    jobs = [(pair, piece, buckets[pair]) for pair, piece in pieces_of_all]
    pool.map(write_piece, jobs, "write", "piece")
    counts = {}
    for pair, train in zip(large, pool.map(join_pieces, cut, "join", "pair")):
        counts[pair.pair] = finish_pair(pair.pair, pair.raw, pair.clean, found[pair.pair], train)
        shutil.rmtree(pair.folder)
    return counts
