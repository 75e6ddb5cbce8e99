"""Writes the tables and the picture of results/study/README.md from the files of the study.

    python scripts/study_report.py                    the tables between their marks, and gap.png
    python scripts/study_report.py --print main       print one table

Everything comes from the CSV files that study.py has written. A table NAME stands between the lines
"<!-- NAME -->" and "<!-- end -->".
"""

import argparse
import re
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import numpy as np
from result_files import markdown, read_csv
from scipy.stats import ttest_rel
from study import read_trainings
from study_scores import KEY, MEAN, STUDY, draws_file, key_of, same, scores_file
from study_speed import KINDS, speeds_file

from fairseq_smoe.accounting.flops import count_row
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.files import write_whole
from fairseq_smoe.tables.significance import interval

README = STUDY / "README.md"
PICTURE = STUDY / "gap.png"
BASELINE = "vanilla-moe"
CONTEXT = 30  # tokens that a token attends to, about the mean length of a sentence in pieces
EXPERTS = ("encoder_experts", "decoder_experts")
PASSES = ("encoder_capacity", "decoder_capacity")
BIN = 500  # updates over which training losses are averaged


@dataclass(frozen=True)
class Result:
    """What a finished training has come to.

    Attributes:
        training: :class:`~study.Training`
        losses: its lines in the CSV file of losses.
        scores: ``{text: {"bleu": ..., "chrf++": ...}}``, means over the directions.
    """

    training: object
    losses: list
    scores: dict

    def final(self, kind):
        """Loss on a text after the last update, in bits a token; None if it was not measured."""
        updates = self.training.options["--max-update"]
        found = [x for x in self.losses if (x["kind"], x["updates"]) == (kind, updates)]
        return float(found[0]["nll_loss"]) if found else None

    def logged(self, name):
        """A number of the log, on validation text after the last update; None for a model that has
        none."""
        found = [x for x in self.losses if x["kind"] == "idev"][-1][name]
        return float(found) if found else None

    def draws(self, text):
        """BLEU on every draw of the bootstrap, mean of the directions."""
        lines = read_csv(draws_file(text))
        (line,) = (line for line in lines if same(line, key_of(self.training)))
        return np.array([float(value) for name, value in line.items() if name not in KEY])

    def train_losses(self):
        """``{first update of a bin: mean training loss in bits a token}``"""
        bins = {}
        for line in self.losses:
            if line["kind"] == "train":
                bins.setdefault((int(line["updates"]) - 1) // BIN * BIN, []).append(line)
        return {start: mean(float(x["nll_loss"]) for x in lines) for start, lines in bins.items()}


def results(*groups):
    """The finished trainings of some groups, in the order of runs.json."""
    scores = read_csv(scores_file())
    found = []
    for training in read_trainings(STUDY / "runs.json"):
        if training.group not in groups:
            continue
        means = {
            line["text"]: {metric: float(line[metric]) for metric in ("bleu", "chrf++")}
            for line in scores
            if same(line, key_of(training)) and line["direction"] == MEAN
        }
        result = Result(training, training.collected(), means)
        if result.final("idev") is not None:
            found.append(result)
    return found


def by_row(found):
    """``{row: {seed: result}}``"""
    rows = {}
    for result in found:
        rows.setdefault(result.training.row, {})[result.training.seed] = result
    return rows


def family_table():
    """All systems, trained alike: size, cost, quality, and speed relative to the dense model."""
    speeds = {}
    for line in read_csv(speeds_file()):
        ratio = float(line["tokens_per_second"]) / float(line["dense_tokens_per_second"])
        speeds.setdefault((line["group"], line["row"], line["kind"]), []).append(ratio)
    lines = []
    for result in results("family"):
        training = result.training
        parameters, flops, _ = count_row(*row_of(training), context=CONTEXT)
        measured = [speeds.get((training.group, training.row, kind)) for kind in KINDS]
        lines.append(
            [
                *(title(training.row), f"{parameters / 1e6:.2f}M", f"{flops / 1e6:.2f}"),
                *(told(result.logged(name), 1) for name in (*PASSES, *EXPERTS)),
                *(told(result.final(text)) for text in ("idev", "flores")),
                *(told(mean_score([result], "itest", name), 2) for name in ("bleu", "chrf++")),
                *(told(median(ratios), 2) if ratios else "" for ratios in measured),
            ]
        )
    return markdown(
        [
            *("row", "parameters", "MFLOPs", "passes enc", "dec", "experts enc", "dec"),
            *("loss idev", "loss Flores dev", "BLEU itest", "chrF++", *KINDS),
        ],
        lines,
    )


def rate_table():
    rates = {}
    for result in results("rate"):
        rates.setdefault(result.training.row, {})[result.training.lr] = result.final("idev")
    columns = sorted({lr for found in rates.values() for lr in found}, key=float)
    lines = []
    for row, found in rates.items():
        best = min(found.values())
        cells = [found.get(lr) for lr in columns]
        lines.append([title(row), *(f"**{x:.3f}**" if x == best else told(x) for x in cells)])
    return markdown(["row", *columns], lines)


def main_table(*groups):
    """One line for each row: means over its seeds."""
    lines = []
    for row, seeds in by_row(results(*groups)).items():
        runs = list(seeds.values())
        parameters, flops, _ = count_row(*row_of(runs[0].training), context=CONTEXT)
        lines.append(
            [
                *(title(row), ", ".join(map(str, sorted(seeds))), runs[0].training.lr),
                *(f"{parameters / 1e6:.2f}M", f"{flops / 1e6:.2f}"),
                *(told(mean_of(run.logged(name) for run in runs), 1) for name in EXPERTS),
                *(told(mean_of(run.final(text) for run in runs)) for text in ("idev", "flores")),
                *(
                    told(mean_score(runs, text, metric), digits)
                    for text in ("itest", "flores")
                    for metric, digits in (("bleu", 2), ("chrf++", 1))
                ),
            ]
        )
    return markdown(
        [
            *("row", "seeds", "rate", "parameters", "MFLOPs", "experts enc", "dec"),
            *("loss idev", "loss Flores dev", "BLEU itest", "chrF++", "BLEU Flores", "chrF++"),
        ],
        lines,
    )


def difference_table(*groups, baseline=BASELINE):
    """Each row against the baseline with the same seeds: loss and BLEU on held-out text. Intervals
    are of 95%: over seeds by t where there are two or more, of BLEU with one seed by bootstrap."""
    rows = by_row(results(*groups))
    lines = []
    for row, seeds in rows.items():
        common = sorted(seeds.keys() & rows.get(baseline, {}).keys())
        if row == baseline or not common:
            continue
        pairs = [(seeds[seed], rows[baseline][seed]) for seed in common]
        losses = [(a.final("idev"), b.final("idev")) for a, b in pairs]
        cells = [", ".join(map(str, common)), told_difference(losses, 3)]
        for text in ("itest", "flores"):
            both = [pair for pair in pairs if all(text in result.scores for result in pair)]
            scores = [[result.scores[text]["bleu"] for result in pair] for pair in both]
            cells.append(told_difference(scores, 2) if both else "")
            cells.append(told_bootstrap(both, text) if both else "")
        lines.append([title(row), *cells])
    return markdown(
        ["row", "seeds", "loss idev", "BLEU itest", "bootstrap", "BLEU Flores", "bootstrap"], lines
    )


def told_difference(pairs, digits):
    """Mean difference, with its t interval over seeds."""
    ours, theirs = zip(*pairs)
    text = told(mean(ours) - mean(theirs), digits, sign=True)
    if len(pairs) == 1:
        return text
    low, high = ttest_rel(ours, theirs).confidence_interval()
    return f"{text} ({low:+.{digits}f} to {high:+.{digits}f})"


def told_bootstrap(pairs, text):
    """Interval of the mean difference in BLEU over draws from the test set."""
    draws = mean_draws(a.draws(text) for a, _ in pairs) - mean_draws(
        b.draws(text) for _, b in pairs
    )
    low, high = interval(draws)
    return f"{low:+.2f} to {high:+.2f}"


def mean_draws(draws):
    return np.mean(list(draws), axis=0)


def ideas_table():
    """Loss after the probe's last update; differences to the row without the idea, and of the
    stratified to the vanilla mixture that is treated in the same way."""
    rows = by_row(results("ideas"))
    lines = []
    for vanilla, smoe in IDEAS:
        if not (rows.keys() >= {smoe, SMOE, BASELINE}):
            continue
        seeds = sorted(rows[smoe])
        against = rows.get(vanilla, {})
        cells = []
        for row, plain in ((vanilla, BASELINE), (smoe, SMOE)):
            both = [
                (rows[row][s].final("idev"), rows[plain][s].final("idev"))
                for s in seeds
                if s in rows.get(row, {}) and s in rows[plain]
            ]
            cells.append(told(mean(x for x, _ in both)) if both else "")
            cells.append(each_difference(both) if row != plain else "")
        both = [
            (rows[smoe][s].final("idev"), against[s].final("idev")) for s in seeds if s in against
        ]
        lines.append([title(smoe), *cells, each_difference(both)])
    return markdown(
        ["row", "vanilla", "by the idea", "stratified", "by the idea", "stratified - vanilla"],
        lines,
    )


SMOE = "smoe-2-2-2-2"
# (vanilla mixture, stratified one) that an idea was given to
IDEAS = (
    (BASELINE, SMOE),
    ("vanilla-moe-narrow", "smoe-4-4-4-4-narrow"),
    ("vanilla-moe-upcycled", "smoe-2-2-2-2-upcycled"),
    ("vanilla-moe-rezero", "smoe-2-2-2-2-rezero"),
    (BASELINE, "smoe-2-2-2-2-curriculum"),
    ("vanilla-moe-ds-init", "smoe-2-2-2-2-ds-init"),
)


def each_difference(pairs):
    """The difference of every seed."""
    return ", ".join(f"{ours - theirs:+.3f}" for ours, theirs in pairs)


def gap_table(*groups):
    """Distance of the training loss to the vanilla mixture with the same seed, against updates."""
    gaps = all_gaps(*groups)
    starts = sorted({start for gap in gaps.values() for start in gap})
    lines = [
        [
            f"{start + 1:,}-{start + BIN:,}",
            *(told(gap.get(start), 3, True) for gap in gaps.values()),
        ]
        for start in starts
    ]
    return markdown(["updates", *map(title, gaps)], lines)


def all_gaps(*groups):
    """``{row: {first update of a bin: distance}}``, means over the seeds."""
    rows = by_row(results(*groups))
    gaps = {}
    for row, seeds in rows.items():
        common = seeds.keys() & rows.get(BASELINE, {}).keys()
        if row == BASELINE or not common:
            continue
        curves = [(seeds[s].train_losses(), rows[BASELINE][s].train_losses()) for s in common]
        starts = set.intersection(*(ours.keys() & theirs.keys() for ours, theirs in curves))
        gaps[row] = {
            start: mean(ours[start] - theirs[start] for ours, theirs in curves)
            for start in sorted(starts)
        }
    return gaps


def draw_gaps(path, *groups):
    from fairseq_smoe.plots.style import COLOURS, LINES, bare, plt, save

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.axhline(0, color="#999999", linewidth=1)
    for number, (row, gap) in enumerate(all_gaps(*groups).items()):
        style = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": LINES[number // len(COLOURS)],
        }
        axes.plot([start + BIN / 2 for start in gap], gap.values(), label=title(row), **style)
    axes.set_xlabel("updates of 2,000 tokens")
    axes.set_title(
        "Training loss, distance to the vanilla mixture, bits a token", loc="left", fontsize=11
    )
    axes.legend(frameon=False, ncols=2, fontsize=9)
    bare(axes)
    save(figure, path)


def title(row):
    """Name of a row in the benchmark."""
    return benchmarks.load(str(STUDY / "study-m4.json")).row(row).name


def row_of(training):
    benchmark = benchmarks.load(str(STUDY / training.benchmark))
    return benchmark, benchmark.row(training.row)


def mean_of(numbers):
    """Mean; None if one is None."""
    numbers = list(numbers)
    return None if None in numbers else mean(numbers)


def mean_score(runs, text, metric):
    """Mean over the runs that have translated a text; None if none has."""
    scores = [run.scores[text][metric] for run in runs if text in run.scores]
    return mean(scores) if scores else None


def told(number, digits=3, sign=False):
    return "" if number is None else f"{number:{'+' if sign else ''}.{digits}f}"


TABLES = {
    "rate": rate_table,
    "main": partial(main_table, "main"),
    "differences": partial(difference_table, "main"),
    "gaps": partial(gap_table, "main"),
    "ideas": ideas_table,
    "family": family_table,
}


def filled(text):
    """The text with every table between its marks made anew."""

    def made(match):
        return f"{match[1]}\n\n{TABLES[match[2]]()}\n\n{match[3]}"

    return re.sub(r"(<!-- (\w+) -->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", choices=TABLES, metavar="NAME", help=f"of {', '.join(TABLES)}")
    args = parser.parse_args()
    if args.print:
        print(TABLES[args.print]())
        return
    write_whole(README, filled(README.read_text()))
    if all_gaps("main"):
        draw_gaps(PICTURE, "main")


if __name__ == "__main__":
    main()
