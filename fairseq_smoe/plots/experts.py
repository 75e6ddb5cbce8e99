"""Which experts a language uses, and how far into the strata a direction goes."""

import numpy as np

from fairseq_smoe.plots.heat_map import plot_heat_map
from fairseq_smoe.plots.style import by_resource


def language_shares(rows, side):
    """Share of first choices per language, over all directions with that language: as the source in
    the encoder, as the target in the decoder.

    Args:
        rows: of the table ``experts``.

    Returns:
        rows ``(language, block, expert, stratum, first choices, share)``
    """
    position = ("encoder", "decoder").index(side)
    firsts, totals = {}, {}
    for row in rows:
        if row["side"] == side:
            lang = row["direction"].split("-")[position]
            key = lang, row["block"], row["expert"], row["stratum"]
            firsts[key] = firsts.get(key, 0) + row["first_choices"]
            totals[key[:2]] = totals.get(key[:2], 0) + row["first_choices"]
    return [
        (*key, count, round(count / max(totals[key[:2]], 1), 6)) for key, count in firsts.items()
    ]


def plot_experts(shares, title, path, benchmark=None):
    """Draw the rows of :func:`language_shares` as a heat map of experts, with lines between strata,
    against languages from high to low resource, English first."""
    order = [benchmark.english, *by_resource(benchmark)] if benchmark else []
    langs = list(dict.fromkeys(row[0] for row in shares))
    langs.sort(key=lambda lang: order.index(lang) if lang in order else len(order))
    panels = []
    for block in sorted({row[1] for row in shares}):
        own = [row for row in shares if row[1] == block]
        strata = {expert: stratum for _, _, expert, stratum, _, _ in own}
        values = np.full((len(strata), len(langs)), np.nan)
        for lang, _, expert, _, _, share in own:
            values[expert - 1, langs.index(lang)] = share
        names = [f"expert {expert} (stratum {strata[expert]})" for expert in sorted(strata)]
        panels.append((f"block {block}", names, values))
    lines = [e - 1 for e in sorted(strata) if strata.get(e + 1, strata[e]) != strata[e]]
    plot_heat_map(panels, langs, title, path, "share of first choices", lines)


def plot_strata(rows, bands, title, path):
    """Draw the share of tokens that met each stratum's gate, per direction.

    Args:
        rows: of the table ``strata``, of one side.
        bands: of :func:`~fairseq_smoe.plots.style.arrange`.
    """
    directions = [direction for band in bands for direction in band.directions]
    names = [direction.replace("-", " → ") for direction in directions]
    panels = []
    for block in sorted({row["block"] for row in rows}):
        own = [row for row in rows if row["block"] == block]
        values = np.full((max(row["stratum"] for row in own), len(directions)), np.nan)
        for row in own:
            values[row["stratum"] - 1, directions.index(row["direction"])] = row["visit_share"]
        strata = [f"stratum {i + 1}" for i in range(len(values))]
        panels.append((f"block {block}", strata, values))
    plot_heat_map(panels, names, title, path, "share of tokens that met the gate", highest=1)
