"""Tables, through the command: the paper's, a benchmark's beside it, and those of any runs."""

import csv
import json
import re
import shutil
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import toy_task
from evaluation_folders import sentences, worse, write_evaluation, write_flores200_model
from sacrebleu.metrics import BLEU

from fairseq_smoe import __main__ as command_line
from fairseq_smoe.benchmarks import benchmark
from fairseq_smoe.evaluation import scoring
from fairseq_smoe.evaluation.translation_metrics import PieceBleu
from fairseq_smoe.tables import paper_table
from fairseq_smoe.tables.cells import best_two
from fairseq_smoe.tables.latex import render as latex
from fairseq_smoe.tables.layout import Layout, Section, Text, number
from fairseq_smoe.tables.significance import Bootstrap, mean_of, p_value

# beside the repository: the paper's tables as they were transcribed
TRANSCRIBED = toy_task.REPOSITORY.parent / "shared" / "paper"
FILES = {"m4": "table1_m4.tsv", "m15": "table2_m15.tsv", "opus100": "table3_opus100.tsv"}
M4 = ["nso-eng", "msa-eng", "tgl-eng", "cat-eng", "eng-nso", "eng-msa", "eng-tgl", "eng-cat"]
SIZE = 40


def options(*words):
    parser = ArgumentParser()
    scoring.add_scoring_options(parser)
    return parser.parse_args(words)


def tabulate(*words, check=True):
    return toy_task.run(
        toy_task.COMMANDS / "python", "-m", "fairseq_smoe", "tabulate", *words, check=check
    )


def error_of(*words):
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as caught:
        command_line.main(["tabulate", *map(str, words)])
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def make_run(folder, row, share, seed=42, directions=M4, num_updates=70, data="/data", **changes):
    """A run that translates with that share of wrong words, evaluated and scored."""
    facts = {"benchmark": "m4", "row": row, "scale": "small", "seed": seed, "data": data, **changes}
    slug = benchmark.load("m4").row(row).slug
    references = {direction: sentences(SIZE, seed=i) for i, direction in enumerate(directions)}
    evaluation = write_evaluation(
        folder / "m4-small" / f"{slug}-seed{seed}",
        {
            # every run is wrong in other words
            direction: (worse(lines, share, seed=len(slug) * 100 + seed + i), lines)
            for i, (direction, lines) in enumerate(references.items())
        },
        run_facts=facts,
        num_updates=num_updates,
    )
    extra = {"model": {"parameters": 148_700_000, "flops_per_token": 191e6}}
    return scoring.score_folder(evaluation, options("--metrics", "piece-bleu", "bleu"), extra)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Vanilla MoE, one better with two seeds, and one that is hardly different."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder, "Vanilla MoE", 0.30)
    make_run(folder, "SMoE-4-4", 0.20)
    make_run(folder, "SMoE-4-4", 0.22, seed=43)
    make_run(folder, "Dense", 0.30)
    return folder


def read_markdown(text):
    """``{(row, kind): {header: cell}}`` over all parts of a table."""
    cells, header, row = {}, None, ""
    for line in text.splitlines():
        if not line.startswith("| "):
            header = header if line.startswith("|-") else None
            continue
        parts = [part.strip() for part in line.strip("|").split("|")]
        if header is None:
            header = parts
            continue
        row = parts[0].removesuffix(" (baseline)") or row
        kind = parts[1] if header[1] == "" else ""
        cells.setdefault((row, kind), {}).update(zip(header[1:], parts[1:]))
    return cells


def plain(cell):
    return cell.strip("*_▲▼")


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


# --------------------------------------------------------------------------------------
# the paper's table


@pytest.mark.parametrize("name", benchmark.PAPERS)
def test_means_recomputed_from_the_columns_are_the_printed_ones(name):
    """Each column is rounded to 0.005, and so is the mean."""
    bm = benchmark.load(name)
    expected = {"m4": {"avg"}}.get(name, {"eng-xxx_all", "xxx-eng_all", "avg"})
    for row in bm.rows:
        means = paper_table.recompute_means(bm, row.scores)
        assert means.keys() == expected
        for column, mean in means.items():
            assert mean == pytest.approx(row.scores[column], abs=0.0101), (row.name, column)
    changed = {**bm.rows[0].scores, bm.scored_columns[1]: 0.0}
    assert paper_table.recompute_means(bm, changed)["avg"] < bm.rows[0].scores["avg"] - 1


@pytest.mark.parametrize("name", benchmark.PAPERS)
def test_printed_table_holds_the_transcribed_figures(name):
    path = TRANSCRIBED / FILES[name]
    if not path.exists():
        pytest.skip(f"{path}: the transcribed tables are not part of the repository")
    with open(path, encoding="utf-8", newline="") as handle:
        expected = list(csv.DictReader(handle, delimiter="\t"))
    lines = tidy_of(paper_table.collect_lines(benchmark.load(name)))
    for entry in expected:
        method = entry.pop("method")
        size = [entry.pop("params", ""), entry.pop("flops_per_token", "").removesuffix("M")]
        assert lines[method] == ({column: float(text) for column, text in entry.items()}, size)
    assert len(lines) == len(expected)


def tidy_of(lines):
    return {
        line.name: (
            {column: cell.paper for column, cell in line.cells.items()},
            list(line.paper_size),
        )
        for line in lines
    }


def test_paper_table_marks_best_and_second_best(tmp_path):
    outcome = tabulate("m15", "--paper", "--to", tmp_path)
    rows = read_markdown(outcome.stdout)
    assert rows["SMoE-4-12", ""]["avg of all"] == "**32.93**"
    assert rows["SMoE-4-4-4-4", ""]["avg of all"] == "*32.75*"
    # it has twice the parameters, and would be the best
    assert rows["Vanilla MoE, 32 experts", ""]["avg of all"] == "32.94"
    assert rows["Dense", ""]["avg of all"] == "29.60 (29.61)"
    assert rows["MoE+CMR", ""]["#params"] == "1.01B"
    assert (tmp_path / "table.md").read_text() == outcome.stdout
    assert len(read_csv(tmp_path / "table.csv")) == 12 * 9
    assert r"\textbf{32.93}" in (tmp_path / "table.tex").read_text()


def test_ties_share_the_best_and_the_second_place():
    assert best_two(
        {"a": 1.001, "b": 1.0, "c": 0.9, "d": 0.904, "e": 0.9, "f": 0.1, "g": None}
    ) == {"a": "best", "b": "best", "c": "second", "d": "second", "e": "second"}
    assert best_two({"a": 1.0, "b": None}) == {}


# --------------------------------------------------------------------------------------
# a benchmark


@pytest.fixture(scope="module")
def table(runs, tmp_path_factory):
    """``(Markdown cells, CSV lines, whole Markdown, LaTeX)`` of the runs."""
    folder = tmp_path_factory.mktemp("table")
    outcome = tabulate("m4", "--runs", runs, "--scale", "small", "--to", folder)
    text = (folder / "table.md").read_text()
    assert text == outcome.stdout
    latex_text = (folder / "table.tex").read_text()
    return read_markdown(text), read_csv(folder / "table.csv"), text, latex_text


def scores_of(runs, slug, seed=42):
    path = runs / f"m4-small/{slug}-seed{seed}/evaluation/test/scores.json"
    return {
        direction: numbers["piece-bleu"]
        for direction, numbers in json.loads(path.read_text())["directions"].items()
    }


def test_rows_hold_ours_the_papers_and_the_difference(table, runs):
    cells, *_ = table
    ours = scores_of(runs, "dense")
    assert plain(cells["Dense", "ours"]["eng-nso"]) == f"{ours['eng-nso']:.2f}"
    assert cells["Dense", "paper"]["eng-nso"] == "26.68"
    assert cells["Dense", "difference"]["eng-nso"] == f"{ours['eng-nso'] - 26.68:+.2f}"
    mean = sum(ours.values()) / 8
    assert plain(cells["Dense", "ours"]["avg of all"]) == f"{mean:.2f}"
    assert cells["Dense", "ours"]["#params"] == "148.7M"
    assert cells["Dense", "paper"]["#params"] == "60M"
    assert (cells["Dense", "ours"]["MFLOPs"], cells["Dense", "paper"]["MFLOPs"]) == ("191", "167")


def test_rows_stand_in_the_papers_order_run_or_not(table):
    cells, lines, text, _ = table
    rows = [row.name for row in benchmark.load("m4").rows]
    assert list(dict.fromkeys(row for row, _ in cells)) == rows
    assert list(dict.fromkeys(line["row"] for line in lines)) == rows
    assert (
        cells["MoE+EOM", "ours"]["avg of all"] == "—"
        and cells["MoE+EOM", "paper"]["avg of all"] == "40.10"
    )
    assert ("MoE+EOM", "difference") not in cells
    assert "not run (Switch Transformer, MoE+EOM," in text


def test_several_seeds_are_a_mean_with_its_spread(table, runs):
    cells, lines, text, _ = table
    both = [scores_of(runs, "smoe-4-4", seed)["eng-nso"] for seed in (42, 43)]
    mean, spread = sum(both) / 2, abs(both[0] - both[1]) / 2**0.5
    assert cells["SMoE-4-4", "ours"]["eng-nso"].strip("*_▲▼") == f"{mean:.2f} ±{spread:.2f}"
    found = {
        line["seed"]: float(line["ours"])
        for line in lines
        if (line["row"], line["column"]) == ("SMoE-4-4", "eng-nso")
    }
    expected = {"42": both[0], "43": both[1], "mean": mean}
    assert found == {seed: pytest.approx(score, abs=1e-4) for seed, score in expected.items()}
    assert "seeds 42, 43; where a row has several" in text


def test_seeds_can_be_chosen(runs, tmp_path):
    words = ("--runs", runs, "--scale", "small", "--seeds", "43", "--to", tmp_path)
    outcome = tabulate("m4", *words, "--format", "csv")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    assert {line["seed"] for line in read_csv(tmp_path / "table.csv")} == {"43", ""}
    assert "not tested for significance against Vanilla MoE" in outcome.stdout


def test_best_and_second_best_are_marked_among_ours_and_among_the_papers(table):
    cells, *_ = table
    for kind, number_of_rows in {"ours": 3, "paper": 9}.items():
        for column in [*M4, "avg of all"]:
            found = {row: line[column] for (row, k), line in cells.items() if k == kind}
            values = {
                row: float(plain(cell).split(" ")[0]) for row, cell in found.items() if cell != "—"
            }
            assert len(values) == number_of_rows
            order = sorted(set(values.values()), reverse=True)
            for row, value in values.items():
                sign = {order[0]: "**", order[1]: "*"}.get(value, "")
                assert re.fullmatch(rf"{re.escape(sign)}[\d. ±]+{re.escape(sign)}[▲▼]?", found[row])


def test_marks_and_p_values_are_those_of_the_paired_bootstrap(table, runs):
    """Of a direction, and of the mean over all, with the mean of two seeds."""
    cells, lines, text, _ = table
    metric, bootstrap = PieceBleu(), Bootstrap()

    def resampled(slug, seed, directions):
        folder = runs / f"m4-small/{slug}-seed{seed}/evaluation/test"
        found = {d.name: d for d in scoring.read_directions(folder)}
        return mean_of(
            bootstrap.resample(metric, metric.statistics(*found[d].pieces)) for d in directions
        )

    marks = set()
    for row, slug, seeds in [("Dense", "dense", [42]), ("SMoE-4-4", "smoe-4-4", [42, 43])]:
        for column, directions in benchmark.load("m4").columns().items():
            ours = mean_of(resampled(slug, seed, directions) for seed in seeds)
            theirs = resampled("vanilla-moe", 42, directions)
            p = p_value(ours, theirs)
            key = row, column, "mean" if len(seeds) > 1 else "42"
            (line,) = [e for e in lines if (e["row"], e["column"], e["seed"]) == key]
            assert line["p_value"] == f"{p:.4f}"
            assert line["significant"] == ("yes" if p < 0.05 else "no")
            header = "avg of all" if column == "avg" else column
            mark = cells[row, "ours"][header].lstrip("*_±0123456789. ").strip("*_")
            assert mark == ("" if p >= 0.05 else "▲" if ours.score > theirs.score else "▼")
            marks.add(mark)
    assert {"", "▲"} <= marks
    assert "better or worse than Vanilla MoE: two-sided paired bootstrap" in text
    assert not any(line["p_value"] for line in lines if line["row"] == "Vanilla MoE")


def test_another_baseline_and_metric(runs):
    outcome = tabulate(
        *("m4", "--runs", runs, "--scale", "small", "--baseline", "dense", "--metric", "bleu")
    )
    assert "better or worse than Dense" in outcome.stdout and "| Dense (baseline)" in outcome.stdout
    assert "The paper's scores are piece-bleu, ours bleu: do not compare them." in outcome.stdout
    assert "tok:13a" in outcome.stdout


def test_caption_says_what_the_numbers_are(table):
    text = table[2]
    assert "M4, piece-bleu, scale small, beside Table 1 of the paper" in text
    assert "Scores on test after 70 updates at scale small (beam 5)." in text
    assert "langtok:yes" in text
    assert "are no reproduction of the paper's" in text
    assert "Warning" not in text
    cleaning = "Cleaning of the training text: not recorded (M4 defines: none)."
    assert cleaning in text and cleaning in table[3]
    assert {line["cleaning"] for line in table[1]} == {"not recorded"}


def test_lines_are_not_too_wide_for_a_terminal(table):
    assert max(len(line) for line in table[2].splitlines() if line.startswith("|")) <= 120


def test_latex_has_as_many_cells_as_columns(table):
    text = table[3]
    (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    for line in re.findall(r"^.*\\\\$", body, re.MULTILINE):
        spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
        assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == len(columns)
    unescaped = re.sub(r"\\[{}]", "", text)
    assert unescaped.count("{") == unescaped.count("}")
    assert text.isascii()
    assert r"\underline{" in text and r"$^{\uparrow}$" in text and r"$\pm$" in text


def test_latex_escapes_what_is_special():
    layout = Layout(
        "a_b & c", ["50% ~ {x}"], ["run"], [Section("", ["n#"])], [[Text("r_1^2"), number(1)]]
    )
    text = latex(layout)
    assert r"\caption{a\_b \& c. 50\% \textasciitilde{} \{x\}}" in text
    assert "r\\_1\\textasciicircum{}2 & 1.00 \\\\" in text and "run & n\\# \\\\" in text


def test_two_runs_of_a_row_and_seed_are_an_error(tmp_path):
    """One would silently stand for both."""
    make_run(tmp_path, "Dense", 0.3)
    shutil.copytree(tmp_path / "m4-small/dense-seed42", tmp_path / "m4-small/dense-copy")
    message = error_of("m4", "--runs", tmp_path, "--scale", "small")
    assert "dense-copy" in message and "are both Dense with seed 42" in message


def test_runs_that_differ_in_conditions_are_pointed_out(tmp_path):
    first = {"data": "/data/a", "batch_tokens": 1000, "cleaning": "none"}
    second = {"data": "/data/b", "batch_tokens": 2000, "cleaning": "default"}
    make_run(tmp_path, "Vanilla MoE", 0.3, **first)
    make_run(tmp_path, "Dense", 0.3, num_updates=90, **second)
    make_run(tmp_path, "SMoE-4-4", 0.3, directions=M4[:5], **first)
    outcome = tabulate("m4", "--runs", tmp_path, "--scale", "small")
    warnings = [line for line in outcome.stdout.splitlines() if "**Warning:**" in line]
    assert [re.search("differ in ([a-z ]+):", line)[1] for line in warnings] == [
        "updates",
        "target tokens per update",
        "data",
        "cleaning of the training text",
        "directions",
    ]
    assert "text: default (dense-seed42); none (the others)" in warnings[3]
    assert "Cleaning of the training text: default; none (M4 defines: none)." in outcome.stdout
    assert "updates: 90 (dense-seed42); 70 (the others)" in warnings[0]
    assert "after 70 to 90 updates" in outcome.stdout
    cells = read_markdown(outcome.stdout)
    assert cells["SMoE-4-4", "ours"]["avg of all"] == "—" != cells["SMoE-4-4", "ours"]["nso-eng"]


def test_translations_that_changed_since_they_were_scored_are_not_tested(tmp_path):
    for row in ("Vanilla MoE", "Dense"):
        make_run(tmp_path, row, 0.3)
    folder = tmp_path / "m4-small/dense-seed42/evaluation/test"
    for suffix in ("hyp", "ref"):
        path = folder / f"eng-nso.{suffix}.pieces"
        path.write_text("▁other ▁text ▁than ▁before\n" * SIZE)
    outcome = tabulate("m4", "--runs", tmp_path, "--scale", "small")
    warning = re.search(r"Warning:\*\* (.*)", outcome.stdout)[1]
    assert "eng-nso has piece-bleu" in warning and "evaluate again" in warning
    assert "100.00" in warning  # what the files give
    cells = read_markdown(outcome.stdout)
    assert len(cells["Dense", "ours"]) == 12
    outcome = tabulate("m4", "--runs", tmp_path, "--scale", "small", "--no-tests")
    assert "Warning" not in outcome.stdout


def test_other_references_are_not_tested(tmp_path):
    for row in ("Vanilla MoE", "Dense"):
        make_run(tmp_path, row, 0.3)
    folder = tmp_path / "m4-small/dense-seed42/evaluation/test"
    path = folder / "eng-nso.ref.pieces"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    scoring.score_folder(folder, options("--metrics", "piece-bleu"), {})
    words = ("--runs", tmp_path, "--scale", "small", "--to", tmp_path / "out")
    assert "have different references" in tabulate("m4", *words).stdout
    tested = {
        line["column"]: line["p_value"]
        for line in read_csv(tmp_path / "out/table.csv")
        if line["row"] == "Dense"
    }
    assert tested["eng-nso"] == tested["avg"] == "" != tested["nso-eng"]


# --------------------------------------------------------------------------------------
# any runs


@pytest.fixture(scope="module")
def own_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    model = write_flores200_model(folder)
    for name, share in {"first": 0.3, "second": 0.1}.items():
        directions = {d: sentences(SIZE, seed=i) for i, d in enumerate(["de-en", "en-de", "en-nl"])}
        evaluation = write_evaluation(
            folder / name, {d: (worse(lines, share), lines) for d, lines in directions.items()}
        )
        words = options("--metrics", "bleu", "spbleu", "--flores200-spm", str(model))
        scoring.score_folder(evaluation, words, {})
    return folder


def test_own_runs_have_directions_means_and_requested_capacity(own_runs, tmp_path):
    outcome = tabulate(own_runs / "first", own_runs / "second", "--to", tmp_path)
    cells = read_markdown(outcome.stdout)["second", ""]
    path = own_runs / "second/evaluation/test/scores.json"
    expected = {d: n["bleu"] for d, n in json.loads(path.read_text())["directions"].items()}
    expected["mean"] = (expected["en-de"] + expected["en-nl"]) / 2
    expected["mean of all"] = sum(expected[d] for d in ("de-en", "en-de", "en-nl")) / 3
    assert {c: plain(cells[c]) for c in expected} == {c: f"{n:.2f}" for c, n in expected.items()}
    assert (cells["RC encoder"], cells["RC decoder"]) == ("1.50", "1.25")
    assert "Paper" not in outcome.stdout and "▲" not in outcome.stdout
    assert "Cleaning of the training text: not recorded." in outcome.stdout
    lines = read_csv(tmp_path / "table.csv")
    assert {line["row"] for line in lines} == {"first", "second"}
    assert {line["column"] for line in lines} >= {"Out of English: mean", "en-nl"}


def test_own_runs_against_a_baseline_with_another_tokenizer(own_runs):
    outcome = tabulate(
        *(own_runs / "first", own_runs / "second", "--metric", "spbleu", "--baseline", "first"),
        *("--flores200-spm", own_runs / "flores.model"),
    )
    assert "better or worse than first" in outcome.stdout
    assert "▲" in read_markdown(outcome.stdout)["second", ""]["mean of all"]
    assert "tests: 100%" in outcome.stderr


def test_own_runs_against_a_baseline_have_intervals_of_their_means(own_runs, tmp_path):
    words = (own_runs / "first", own_runs / "second", "--baseline", "first")
    outcome = tabulate(*words, "--to", tmp_path)
    cells = read_markdown(outcome.stdout)["second", ""]
    assert "to" not in cells["en-nl"] and "95% of the draws" in outcome.stdout
    (line,) = (
        line
        for line in read_csv(tmp_path / "table.csv")
        if (line["row"], line["column"]) == ("second", "mean of all")
    )
    found = [float(line[name]) for name in ("low", "ours", "high")]
    assert re.search(r"\((\S+) to (\S+)\)", cells["mean of all"]).groups() == (
        f"{found[0]:.2f}",
        f"{found[2]:.2f}",
    )
    # as on new draws for every direction
    rng, means = np.random.default_rng(1), []
    texts = [read_direction(own_runs / "second", name) for name in ("de-en", "en-de", "en-nl")]
    for _ in range(300):
        drawn = rng.integers(SIZE, size=SIZE)
        means.append(np.mean([corpus_bleu(drawn, *pair) for pair in texts]))
    assert found[::2] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.7)
    assert not re.search(r"\d to \d", tabulate(*words, "--no-tests").stdout)


def read_direction(run, direction):
    folder = run / "evaluation" / "test"
    return [
        (folder / f"{direction}.{side}.txt").read_text().splitlines() for side in ("hyp", "ref")
    ]


def corpus_bleu(drawn, *texts):
    hypotheses, references = [[lines[i] for i in drawn] for lines in texts]
    return BLEU().corpus_score(hypotheses, [references]).score


# --------------------------------------------------------------------------------------
# mistakes


def test_mistakes_are_told_in_one_line(runs, own_runs, tmp_path):
    small = ("--runs", runs, "--scale", "small")
    for words, message in {
        ("m5",): "m5: neither a benchmark (m4, m15, opus100, family) nor the folder of a run",
        ("m4", *small, "--metric", "blue"): "--metric blue: choose one of piece-bleu, bleu",
        ("m4", *small, "--baseline", "MoE"): "--baseline MoE: M4 has no such row; choose one of",
        ("m4", *small, "--metric", "chrf++"): "--metric chrf++: ",
        ("m4", *small, "--seeds", "7"): "no runs with --seeds 7 in",
        (
            "m4",
            *small,
            "--subset",
            "valid",
        ): "is evaluated on valid; python -m fairseq_smoe evaluate",
        ("m4", "--runs", runs): "there are runs at --scale small",
        ("m4", "--runs", tmp_path): f"--runs {tmp_path}: no runs in {tmp_path}/m4-paper; train and",
        (tmp_path,): "evaluation/test/scores.json: no such file; evaluate the run first",
        (own_runs / "first", "--paper"): "--paper: needs a benchmark",
        (own_runs / "first", "--baseline", "x"): "--baseline x: is none of the runs first",
    }.items():
        assert message in error_of(*words)
    assert "--metrics chrf++" in error_of("m4", *small, "--metric", "chrf++")
    assert f"--to {Path(__file__)}" in error_of("m4", "--paper", "--to", __file__)
