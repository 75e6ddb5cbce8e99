"""Dividing experts into groups that are alike (Zhang et al. 2024, arXiv 2407.09590, stage 2)."""

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

MOST = 10  # experts whose partitions are all tried: at most 42,525 of them
_DIGITS = 6  # of a similarity; others are noise of rounding, which must not decide between equals


def group(similarity_EE, number):
    """Divide E experts into a number of groups, none of them empty.

    Of up to :data:`MOST` experts the partition with the highest :func:`score` is taken, the first
    one if there are several. Of more, that of :func:`by_linkage`.

    Args:
        similarity_EE: symmetric; the diagonal does not matter.
        number: from 1 to E.

    Returns:
        list of lists of experts, sorted; the groups are in the order of their first experts.
    """
    if number == len(similarity_EE):
        return [[e] for e in range(number)]
    similarity_EE = _rounded(similarity_EE)
    exhaustive = len(similarity_EE) <= MOST
    return (best_partition if exhaustive else by_linkage)(similarity_EE, number)


def score(similarity_EE, groups):
    """How good a partition is: the mean similarity over all pairs of experts in the same group,
    minus that over all pairs in different groups. A mean over no pairs is 0."""
    labels_E = np.empty(len(similarity_EE), dtype=int)
    for label, members in enumerate(groups):
        labels_E[members] = label
    return float(_scores(similarity_EE, labels_E[None])[0])


def _scores(similarity_EE, labels_PE):
    """The :func:`score` of P partitions, each given by the group of every expert."""
    first, second = np.triu_indices(len(similarity_EE), k=1)
    similarity = similarity_EE[first, second]
    inside = labels_PE[:, first] == labels_PE[:, second]
    means = [pairs @ similarity / np.maximum(pairs.sum(1), 1) for pairs in (inside, ~inside)]
    return means[0] - means[1]


def best_partition(similarity_EE, number):
    """The partition with the highest :func:`score`, of all there are."""
    labels_PE = np.array(list(partitions(len(similarity_EE), number)))
    scores_P = _scores(similarity_EE, labels_PE)
    best = np.round(scores_P, _DIGITS + 3).argmax()
    return [np.flatnonzero(labels_PE[best] == label).tolist() for label in range(number)]


def partitions(num_things, number):
    """All ways to divide things into a number of groups, in lexicographic order.

    Yields:
        The group of each thing, a tuple; groups are numbered in the order of their first members.
    """

    def extended(labels, used):
        missing = num_things - len(labels)
        if missing < number - used:  # too few to fill all groups
            return
        if missing == 0:
            yield labels
        else:
            for label in range(min(used + 1, number)):
                yield from extended((*labels, label), max(used, label + 1))

    return extended((), 0)


def by_linkage(similarity_EE, number):
    """Begin with every expert by itself, and join the two groups with the highest mean similarity
    between their members until there are as many groups as asked for (average linkage)."""
    distance_EE = similarity_EE.max() - similarity_EE
    np.fill_diagonal(distance_EE, 0)
    joined = linkage(squareform(distance_EE, checks=False), "average")
    num_experts = len(similarity_EE)
    groups = {e: [e] for e in range(num_experts)}
    for step, (one, other, *_) in enumerate(joined[: num_experts - number]):
        groups[num_experts + step] = groups.pop(int(one)) + groups.pop(int(other))
    return sorted(map(sorted, groups.values()))


def _rounded(similarity_EE):
    """Similarities in units of the largest, without the digits that are noise."""
    similarity_EE = np.array(similarity_EE, dtype=float)
    np.fill_diagonal(similarity_EE, 0)
    return np.round(similarity_EE / (np.abs(similarity_EE).max() or 1), _DIGITS)
