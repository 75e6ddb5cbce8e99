"""The style of all pictures: colours, sizes, the arrangement of directions, saving."""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from fairseq_smoe.files import whole_file  # noqa: E402

# blue and vermilion are distinct for all kinds of colour vision, and in grey
SIDES = {"encoder": ("#0072b2", "o"), "decoder": ("#d55e00", "D")}  # colour and marker
# Okabe and Ito's colours, without yellow, which is too light for lines
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINES = ("-", "--", ":", "-.")
DPI = 150
PER_BAND = 32  # directions side by side


@dataclass(frozen=True)
class Band:
    """Directions that are drawn side by side.

    Attributes:
        title: what they have in common, or "".
        directions: left to right.
        labels: of the directions.
        groups: ``[(name, number of directions)]``, left to right: high, medium, low resource.
    """

    title: str
    directions: list
    labels: list
    groups: list


def arrange(directions, benchmark=None):
    """Directions out of English, then into English, each from high to low resource.

    Without a benchmark, the language that all directions have in common is used instead of English,
    and the given order is kept.

    Args:
        directions: such as ``["en-de", "de-en"]``.
        benchmark: a :class:`~fairseq_smoe.benchmarks.benchmark.Benchmark`, or None.

    Returns:
        list of :class:`Band` of at most :data:`PER_BAND` directions.
    """
    directions = list(directions)
    centre = benchmark.english if benchmark else common_language(directions)
    languages = benchmark.languages if benchmark else ()
    resources = {language.code: language.resource for language in languages}
    order = {code: i for i, code in enumerate(by_resource(benchmark))}
    out_of, into, others = [], [], []
    for direction in directions:
        source, target = direction.split("-")
        if source == centre:
            out_of.append((target, direction))
        elif target == centre:
            into.append((source, direction))
        else:
            others.append((direction.replace("-", " → "), direction))
    bands = []
    for title, members in ((f"out of {centre}", out_of), (f"into {centre}", into), ("", others)):
        members.sort(key=lambda member: order.get(member[0], len(order)))  # stable
        for part in split_evenly(members, PER_BAND):
            if len(directions) <= 12:  # there is room for the full name
                labels = [direction.replace("-", " → ") for _, direction in part]
            else:
                labels = [label for label, _ in part]
            groups = []
            for label, _ in part:
                name = resources.get(label, "")
                if groups and groups[-1][0] == name:
                    groups[-1] = (name, groups[-1][1] + 1)
                else:
                    groups.append((name, 1))
            bands.append(Band(title, [direction for _, direction in part], labels, groups))
    return bands


def by_resource(benchmark):
    """Codes of a benchmark's languages from high to low resource, otherwise in its order."""
    languages = benchmark.languages if benchmark else ()
    levels = {level: i for i, level in enumerate(("high", "medium", "low", "verylow"))}
    return [
        language.code
        for language in sorted(languages, key=lambda each: levels.get(each.resource, len(levels)))
    ]


def common_language(directions):
    """The language on one side of every direction, or None; the source's of a single direction."""
    common = set.intersection(*(set(direction.split("-")) for direction in directions))
    first = directions[0].split("-")
    return next((lang for lang in first if lang in common), None)


def split_evenly(items, most):
    """Consecutive parts of nearly equal length, none longer than ``most``."""
    number = -(-len(items) // most)
    ends = [round(len(items) * i / number) for i in range(number + 1)] if number else [0]
    return [items[a:b] for a, b in zip(ends, ends[1:])]


def label_directions(axes, band, groups=True):
    """Names of the directions below, resource groups above, lines between groups."""
    number = len(band.directions)
    crowded = number > 12
    axes.set_xticks(
        range(number), band.labels, rotation=90 if crowded else 0, fontsize=9 if crowded else 10
    )
    axes.set_xlim(-0.6, number - 0.4)
    axes.tick_params(length=0)
    start = 0
    for name, size in band.groups if groups else ():
        if start:
            axes.axvline(start - 0.5, color="#888888", linewidth=0.8, linestyle=":")
        if name:
            axes.annotate(
                name,
                (start + (size - 1) / 2, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color="#555555",
            )
        start += size


def width_of(bands, least, per_direction):
    """Inches for the longest band."""
    return max(least, 1.6 + per_direction * max(len(band.directions) for band in bands))


def bare(axes):
    """Remove most of the frame, and draw horizontal grid lines."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def save(figure, path):
    """Write a picture that is either complete or absent; its ending chooses the format."""
    with whole_file(path) as handle:
        figure.savefig(handle, dpi=DPI, format=path.suffix[1:])
    plt.close(figure)
