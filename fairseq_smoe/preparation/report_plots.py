"""Pictures of the report."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fairseq_smoe.files import whole_file

# no window system; no date in the file
SAVE = {"format": "png", "dpi": 100, "bbox_inches": "tight", "metadata": {"Software": None}}


def plot_sizes(summary, path):
    """Training lines of every pair, and how often its directions are drawn."""
    pairs = summary["pairs"]
    figure = Figure(figsize=(max(6, 0.16 * len(pairs) + 2), 4))
    axes = figure.subplots()
    x = np.arange(len(pairs))
    axes.bar(x, [facts["kept"] for facts in pairs.values()], color="tab:blue")
    axes.set(yscale="log", xlim=(-0.7, len(pairs) - 0.3))
    axes.set_ylim(bottom=1)  # bars on a logarithmic axis are as long as it says
    axes.set_ylabel("pairs of training sentences", color="tab:blue")
    axes.set_xticks(x, pairs, rotation=90, fontsize="small")
    right = axes.twinx()
    shares = [200 * facts["probability_per_direction"] for facts in pairs.values()]
    right.plot(x, shares, "o", color="tab:orange", markeredgecolor="white")
    temperature = f"T = {summary['temperature']:g}"
    right.set_ylabel(
        f"% of sampled sentences,\nboth directions ({temperature})", color="tab:orange"
    )
    right.set_ylim(bottom=0)
    _save(figure, path)


def plot_lengths(tokens, path):
    """Quartiles of the training sentences' lengths, per language."""
    lengths = {}
    for name, counts in tokens.items():
        split, _, lang = name.split(".")
        if split == "train":
            histogram = np.array(counts["lengths"])
            total = np.zeros(max(len(histogram), len(lengths.get(lang, ()))), dtype=np.int64)
            total[: len(histogram)] += histogram
            total[: len(lengths.get(lang, ()))] += lengths.get(lang, 0)
            lengths[lang] = total
    boxes = [{"label": lang, **_box(lengths[lang])} for lang in sorted(lengths)]
    figure = Figure(figsize=(max(6, 0.16 * len(boxes) + 2), 4))
    axes = figure.subplots()
    axes.bxp(boxes, showfliers=False)
    axes.set(yscale="log", ylabel="tokens per sentence: 5, 25, 50, 75, 95%")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", rotation=90, labelsize="small")
    _save(figure, path)


def _box(histogram):
    shares = np.cumsum(histogram) / histogram.sum()
    names = {"whislo": 0.05, "q1": 0.25, "med": 0.5, "q3": 0.75, "whishi": 0.95}
    return {name: int(np.searchsorted(shares, share)) for name, share in names.items()}


def _save(figure, path):
    with whole_file(path) as handle:
        figure.savefig(handle, **SAVE)
