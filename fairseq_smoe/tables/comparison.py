"""Choosing the table to make; its lines, tests and files."""

from pathlib import Path

from tqdm import tqdm

from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.scoring import METRICS
from fairseq_smoe.files import write_whole
from fairseq_smoe.tables import (
    benchmark_table,
    conditions,
    latex,
    markdown,
    paper_table,
    run_table,
    tidy,
)
from fairseq_smoe.tables.evaluations import find_evaluations, read_evaluation
from fairseq_smoe.tables.paired_tests import PairedTests

FORMATS = {"markdown": "table.md", "latex": "table.tex", "csv": "table.csv"}
DEFAULT_BASELINE = "Vanilla MoE"


def tabulate(args):
    """What ``python -m fairseq_smoe tabulate`` does with its arguments: prints a table, and writes
    it.

    Raises:
        OptionError: no run matches the arguments, or an evaluation lacks the metric.
    """
    if args.metric is not None and args.metric not in METRICS:
        raise OptionError(f"--metric {args.metric}: choose one of {', '.join(METRICS)}")
    name = args.what[0]
    if len(args.what) == 1 and (name in benchmarks.NAMES or name.endswith(".json")):
        make = _paper if args.paper else _benchmark
        lines, layout, facts = make(benchmarks.load(name), args)
    else:
        for name in args.what:
            if not Path(name).is_dir():
                raise OptionError(
                    f"{name}: neither a benchmark ({', '.join(benchmarks.NAMES)}) nor the folder "
                    "of a run; give one benchmark, or run folders"
                )
        if args.paper:
            raise OptionError(f"--paper: needs a benchmark, {', '.join(benchmarks.NAMES)}")
        lines, layout, facts = _runs(args)
    texts = {
        "markdown": markdown.render(layout),
        "latex": latex.render(layout),
        "csv": tidy.render(lines, facts),
    }
    print(texts["markdown"], end="")
    if args.to:
        _write(args.to, {FORMATS[name]: texts[name] for name in args.format})


def _paper(benchmark, args):
    if not benchmark.table:
        raise OptionError(f"--paper: {benchmark.title} is not one of the paper's benchmarks")
    lines = paper_table.collect_lines(benchmark)
    facts = {"benchmark": benchmark.name, "scale": "paper", "subset": "test"}
    return lines, paper_table.lay_out(benchmark, lines), {**facts, "metric": benchmark.metric}


def _benchmark(benchmark, args):
    metric = args.metric or benchmark.metric
    if metric not in METRICS:
        raise OptionError(
            f"metric {metric} of {benchmark.title}: choose one of {', '.join(METRICS)}"
        )
    baseline = _baseline_row(benchmark, args.baseline)
    found, not_evaluated = find_evaluations(
        args.runs, benchmark, args.scale, args.subset, args.seeds
    )
    evaluations = [e for row in benchmark.rows for e in found.get(row.name, [])]
    _check_metric(evaluations, metric)
    with _Tests(args, metric, evaluations if baseline in found and len(found) > 1 else []) as tests:
        lines = benchmark_table.collect_lines(benchmark, found, metric, baseline, tests)
    layout = benchmark_table.lay_out(
        benchmark, lines, evaluations, args.scale, args.subset, metric, baseline, tests
    )
    layout.warnings += [
        f"not evaluated on {args.subset}: {run}; python -m fairseq_smoe evaluate --run {run}"
        for run in not_evaluated
    ]
    facts = {"benchmark": benchmark.name, "scale": args.scale, "subset": args.subset}
    return lines, layout, {**facts, "metric": metric, "cleaning": conditions.cleanings(evaluations)}


def _baseline_row(benchmark, name):
    if name is None:
        names = [row.name for row in benchmark.rows]
        return DEFAULT_BASELINE if DEFAULT_BASELINE in names else names[0]
    try:
        return benchmark.row(name).name
    except OptionError as error:
        raise OptionError(f"--baseline {error}") from None


def _runs(args):
    metric = args.metric or "bleu"
    evaluations = [read_evaluation(run, args.subset) for run in args.what]
    _check_metric(evaluations, metric)
    with _Tests(args, metric, evaluations if args.baseline else []) as tests:
        lines = run_table.collect_lines(evaluations, metric, args.baseline, tests)
    layout = run_table.lay_out(lines, evaluations, args.subset, metric, args.baseline, tests)
    facts = {"subset": args.subset, "metric": metric}
    return lines, layout, {**facts, "cleaning": conditions.cleanings(evaluations)}


def _check_metric(evaluations, metric):
    for evaluation in evaluations:
        for direction in evaluation.directions:
            evaluation.score(direction, metric)


class _Tests:
    """The tests of a table, with a progress bar; None where there are none to make.

    Args:
        evaluations: all that will be read.
    """

    def __init__(self, args, metric, evaluations):
        directions = sum(len(evaluation.directions) for evaluation in evaluations)
        wanted = evaluations and not args.no_tests and metric != "comet"
        self._bar = tqdm(total=directions, desc="tests", unit="direction", disable=not wanted)
        self._tests = None
        if wanted:
            self._tests = PairedTests(metric, args.flores200_spm, self._bar.update)

    def __enter__(self):
        return self._tests

    def __exit__(self, *_):
        self._bar.close()


def _write(folder, files):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise OptionError(f"--to {folder}: {error.strerror}; choose another folder") from error
    for name, text in files.items():
        write_whole(folder / name, text)
