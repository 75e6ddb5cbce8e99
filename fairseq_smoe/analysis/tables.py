"""Routing counts of a direction to rows of the tables ``capacity``, ``experts``, ``strata``,
``types``, and those tables to CSV files."""

import csv

import numpy as np

from fairseq_smoe.files import whole_file

COLUMNS = {
    "capacity": (
        *("direction", "side", "block", "layer"),
        *("requested_capacity", "tokens", "experts_per_token"),
    ),
    "experts": (
        *("direction", "side", "block", "expert", "stratum"),
        *("first_choices", "choices", "share"),
    ),
    "strata": (
        *("direction", "side", "block", "stratum"),
        *("visits", "visit_share", "exits", "experts_per_visit"),
    ),
    "types": (
        *("direction", "side", "block", "end", "token", "count"),
        *("requested_capacity", "train_frequency", "train_rank"),
    ),
}
ENDS = ("highest", "lowest")


def routing_rows(direction, blocks):
    """Rows of ``capacity``, ``experts`` and ``strata``.

    Blocks, strata and experts are numbered from 1. ``share`` is the expert's share of all first
    choices in its block, ``visit_share`` the share of the tokens that visited the stratum's gate.
    In the row of stratum k, ``exits`` are the tokens that left the block after k passes, from any
    stratum. ``experts_per_token`` is the mean number of experts that a token visits in the block,
    ``experts_per_visit`` the mean number that it visits at one gate. If tokens are split into
    heads, ``tokens``, ``requested_capacity`` and ``experts_per_token`` are those of tokens, and the
    counts in the other tables those of heads.

    Args:
        direction: such as ``"en-de"``.
        blocks: a :class:`~fairseq_smoe.analysis.counts.BlockCounts` per expert block.

    Returns:
        ``{table: list of rows}``
    """
    tables = {"capacity": [], "experts": [], "strata": []}
    for block in blocks:
        key = (direction, block.side, block.block)
        entered = max(block.tokens * block.heads, 1)
        first_choices = max(int(block.first_E.sum()), 1)
        tables["capacity"].append(
            (
                *(*key, block.layer, round(block.requested_capacity, 6), block.tokens),
                round(block.experts_per_token, 6),
            )
        )
        tables["experts"] += [
            (*key, e + 1, stratum + 1, first, chosen, round(first / first_choices, 6))
            for e, (stratum, first, chosen) in enumerate(
                zip(
                    block.stratum_of_expert_E.tolist(),
                    block.first_E.tolist(),
                    block.choices_E.tolist(),
                )
            )
        ]
        tables["strata"] += [
            (*key, i + 1, int(visits), round(visits / entered, 6), int(exits), round(experts, 6))
            for i, (visits, exits, experts) in enumerate(
                zip(block.visits_L, block.exits_L, block.experts_per_visit_L)
            )
        ]
    return tables


def type_rows(direction, blocks, dictionary, frequencies, leave_out, number=25, min_count=5):
    """Rows of ``types``: those of highest and of lowest mean requested capacity, for each block.

    Args:
        dictionary: the vocabulary.
        frequencies: a :class:`~fairseq_smoe.analysis.frequency.TrainingFrequencies`; the encoder's
            types are ranked in the source language, the decoder's in the target language.
        leave_out: vocabulary ids that are no pieces of text.
        number: types at each end; fewer if there are not twice as many.
        min_count: occurrences that a type needs, so that its mean is meaningful.
    """
    langs = dict(zip(("encoder", "decoder"), direction.split("-")))
    rows = []
    for block in blocks:
        count_V, capacity_V = block.type_counts()
        lang = langs[block.side]
        frequency_V, rank_V = frequencies.counts(lang), frequencies.ranks(lang)
        for end, types in choose_types(count_V, capacity_V, leave_out, number, min_count).items():
            rows += [
                (
                    *(direction, block.side, block.block, end, dictionary[int(v)], int(count_V[v])),
                    *(round(float(capacity_V[v]), 6), int(frequency_V[v]), int(rank_V[v])),
                )
                for v in types
            ]
    return rows


def choose_types(count_V, capacity_V, leave_out=(), number=25, min_count=5):
    """``{"highest": ids, "lowest": ids}`` by requested capacity, the extreme ones first.

    Types of the same capacity are in an arbitrary but fixed order. Many make exactly one pass. The
    vocabulary's own order is roughly that of frequency, so it would bias the frequencies of the
    selected types, which the figure is about.
    """
    eligible = count_V >= min_count
    eligible[list(leave_out)] = False
    types = np.flatnonzero(eligible)
    shuffled = np.random.default_rng(1).permutation(len(count_V))
    types = types[np.lexsort((shuffled[types], capacity_V[types]))]
    number = min(number, len(types) // 2)
    return {"highest": types[::-1][:number], "lowest": types[:number]}


def write_table(path, columns, rows):
    """Write a CSV file that is either complete or absent."""
    with whole_file(path, "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def read_table(path):
    """Rows of a CSV file as dicts; numbers as numbers."""
    with open(path, encoding="utf-8", newline="") as handle:
        return [
            {k: v if k in TEXT else _number(v) for k, v in row.items()}
            for row in csv.DictReader(handle)
        ]


# in these columns, a number is text as well: a piece may be "12"
TEXT = frozenset({"direction", "language", "side", "end", "token", "run", "quantity"})


def _number(text):
    try:
        return int(text)
    except ValueError:
        return float(text)


def means_per_token(rows, *columns, of="requested_capacity"):
    """Mean over the tokens of all rows that agree in ``columns``.

    Args:
        rows: of the table ``capacity``.
        of: the column to take means of.

    Returns:
        ``{values of the columns: (mean, tokens)}``, in the order of the rows.
    """
    sums = {}
    for row in rows:
        mean = sums.setdefault(tuple(row[column] for column in columns), [0.0, 0])
        if row["tokens"]:  # else the mean is no number
            mean[0] += row[of] * row["tokens"]
            mean[1] += row["tokens"]
    return {key: (total / max(tokens, 1), tokens) for key, (total, tokens) in sums.items()}
