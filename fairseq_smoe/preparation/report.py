"""The report on the data: ``report.json``, ``report.md`` and pictures."""

import json
from dataclasses import asdict
from pathlib import Path

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.cleaning import in_words
from fairseq_smoe.files import write_whole
from fairseq_smoe.preparation import too_long
from fairseq_smoe.preparation.clean import RULES
from fairseq_smoe.preparation.vocabulary import language_shares


def write_report(plan, cleaning, tokens, long):
    """Write the report into ``plan.target``.

    Args:
        cleaning: ``{pair: {split: counts}}``; see
            :func:`~fairseq_smoe.preparation.clean.clean_training_text`.
        tokens: ``{"SPLIT.PAIR.LANG": {"lines", "tokens", "unknown", "lengths"}}``
        long: the sentences of :func:`~fairseq_smoe.preparation.too_long.find_too_long`.
    """
    summary = summarise(plan, cleaning, tokens, long)
    write_whole(plan.target / "report.json", json.dumps(summary, indent=1) + "\n")
    pictures = ["report-sizes.png", "report-lengths.png"]
    try:
        from fairseq_smoe.preparation import report_plots
    except ModuleNotFoundError:
        print("report: no pictures, they need matplotlib; pip install 'fairseq-smoe[data]'")
        pictures = []
    else:
        report_plots.plot_sizes(summary, plan.target / pictures[0])
        report_plots.plot_lengths(tokens, plan.target / pictures[1])
    write_whole(plan.target / "report.md", as_markdown(summary, pictures))


def summarise(plan, cleaning, tokens, long):
    """All numbers of the report in one dict, pairs by size."""
    pairs = {}
    for pair, splits in cleaning.items():
        train = splits["train"]
        pairs[pair] = {
            "found": sum(train[name]["lines"] for name in (*RULES, "kept")),
            "kept": train["kept"]["lines"],
            "words": train["kept"]["words"],
            "dropped": {rule: train[rule] for rule in RULES},
            "kept_in_held_out": train["in_held_out"],
            "repaired_lines": sum(counts["repaired"]["lines"] for counts in splits.values()),
            "too_long": long["train"][pair],
            "held_out": {s: c["kept"]["lines"] for s, c in splits.items() if s != "train"},
            "held_out_not_utf8": sum(
                counts["invalid_utf8"]["lines"] for s, counts in splits.items() if s != "train"
            ),
            "sides": {lang: _side(tokens[f"train.{pair}.{lang}"]) for lang in pair.split("-")},
        }
    shares = language_shares({p: f["kept"] for p, f in pairs.items()}, plan.temperature)
    for pair, facts in pairs.items():
        facts["probability_per_direction"] = shares[pair] / 2
    return {
        "title": benchmarks.load(plan.benchmark).title if plan.benchmark else "Prepared data",
        "vocabulary": {
            "of": plan.vocabulary_of,
            "pieces": plan.vocab_size,
            "character_coverage": plan.character_coverage,
            "sample_lines": plan.sample_lines,
            "seed": plan.seed,
        },
        "temperature": plan.temperature,
        "cleaning": in_words(plan.cleaning, asdict(plan.rules)),
        "rules": asdict(plan.rules),
        "left_out": [pair for pair in plan.pairs if pair not in pairs],
        "train": _sum_over(pairs.values()),
        "too_long": {
            **long,
            # names without folders: the same text gives the same report
            "held_out": [{**e, "file": Path(e["file"]).name} for e in long["held_out"]],
        },
        "pairs": dict(sorted(pairs.items(), key=lambda item: -item[1]["kept"])),
    }


def _side(counts):
    lines, tokens = counts["lines"], counts["tokens"]
    return {
        "tokens": tokens,
        "tokens_per_line": tokens / lines,
        "unknown_rate": counts["unknown"] / tokens,
    }


def _sum_over(pairs):
    pairs = list(pairs)
    return {
        "found": sum(facts["found"] for facts in pairs),
        "kept": sum(facts["kept"] for facts in pairs),
        "words": sum(facts["words"] for facts in pairs),
        "tokens": sum(side["tokens"] for facts in pairs for side in facts["sides"].values()),
        "kept_in_held_out": _sum_of(facts["kept_in_held_out"] for facts in pairs),
        "repaired_lines": sum(facts["repaired_lines"] for facts in pairs),
        "dropped": {rule: _sum_of(facts["dropped"][rule] for facts in pairs) for rule in RULES},
    }


def _sum_of(counts):
    counts = list(counts)
    return {unit: sum(count[unit] for count in counts) for unit in ("lines", "words")}


def as_markdown(summary, pictures):
    train, vocabulary = summary["train"], summary["vocabulary"]
    kind = "Joint SentencePiece vocabulary"
    if vocabulary["of"]:
        base = vocabulary["of"]
        kind = f"The vocabulary of {base}; new languages have a SentencePiece model each"
    parts = [
        f"# {summary['title']}",
        f"{len(summary['pairs'])} language pairs with {train['kept']:,} pairs of training "
        f"sentences and {train['tokens']:,} tokens, both sides and each sentence's end included. "
        f"{kind} of {vocabulary['pieces']:,} pieces, character coverage "
        f"{vocabulary['character_coverage']}, trained on at most {vocabulary['sample_lines']:,} "
        f"lines drawn at temperature {summary['temperature']:g}, seed {vocabulary['seed']}.",
        "## Cleaning of the training text",
        _table(["dropped as", "pairs of lines", "share", "words"], _cleaning_rows(summary)),
        _rules_in_words(summary),
        overlap_in_words(train["kept_in_held_out"]["lines"], train["kept"]) + ".",
        *_repairs_in_words(train["repaired_lines"]),
        *_what_is_missing(summary),
        *too_long.in_words(summary["too_long"]),
        "## Pairs",
        "Probability: of each of the two directions, when training samples at temperature "
        f"{summary['temperature']:g}. Unknown: share of tokens that are not in the vocabulary. Two "
        "figures in a cell are of the two languages in the order of the pair's name.",
        _table(
            [
                *("pair", "lines", "valid", "test", "tokens"),
                *("tokens per line", "unknown", "probability"),
            ],
            [_pair_row(pair, facts) for pair, facts in summary["pairs"].items()],
        ),
        *(f"![{name.removesuffix('.png').removeprefix('report-')}]({name})" for name in pictures),
        "## Lines dropped, by rule",
        _table(
            [
                *("pair", "found", "kept"),
                *(rule.replace("_", " ") for rule in RULES),
                "kept though in held-out text",
            ],
            [
                [pair, facts["found"], facts["kept"]]
                + [facts["dropped"][rule]["lines"] for rule in RULES]
                + [facts["kept_in_held_out"]["lines"]]
                for pair, facts in summary["pairs"].items()
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _cleaning_rows(summary):
    train = summary["train"]
    counts = {rule.replace("_", " "): train["dropped"][rule] for rule in RULES}
    for name, count in counts.items():
        yield [name, count["lines"], f"{count['lines'] / train['found']:.2%}", count["words"]]
    yield ["**kept**", train["kept"], f"{train['kept'] / train['found']:.2%}", train["words"]]


def _rules_in_words(summary):
    rules = summary["rules"]
    options = " ".join(f"`--{name.replace('_', '-')} {value}`" for name, value in rules.items())
    return (
        f"Cleaning: {summary['cleaning']}. Rules: {options}. A pair that breaks several is counted "
        "under the first."
    )


def overlap_in_words(lines, kept):
    return (
        f"{lines:,} of the {kept:,} pairs kept ({lines / kept:.2%}) have a side that is also in "
        "the validation or test text of its language, in any pair, ignoring case, width and spaces"
    )


def _repairs_in_words(lines):
    if lines:
        yield (
            f"{lines:,} lines of all splits had control characters or line separators, which are "
            "now spaces, or a byte order mark, which is gone."
        )


def _what_is_missing(summary):
    """Sentences on requested data that is missing."""
    pairs = summary["pairs"]
    without = [pair for pair, facts in pairs.items() if not facts["held_out"].get("valid")]
    dropped = sum(facts["held_out_not_utf8"] for facts in pairs.values())
    if summary["left_out"]:
        yield f"Left out, as no training text was found: {', '.join(summary['left_out'])}."
    if without:
        yield f"Without text to validate on: {', '.join(without)}."
    if dropped:
        yield f"Dropped from text to validate and test on, as not UTF-8: {dropped:,} lines."


def _pair_row(pair, facts):
    sides = facts["sides"].values()
    tests = sum(lines for split, lines in facts["held_out"].items() if split.startswith("test"))
    return [
        pair,
        facts["kept"],
        facts["held_out"].get("valid", 0),
        tests,
        sum(side["tokens"] for side in sides),
        " / ".join(f"{side['tokens_per_line']:.1f}" for side in sides),
        " / ".join(f"{side['unknown_rate']:.2%}" for side in sides),
        f"{facts['probability_per_direction']:.3%}",
    ]


def _table(header, rows):
    def line(cells):
        return "| " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |"

    align = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), align, *map(line, rows)])
