"""``exact_logs.py train|validate OPTIONS``: the command of fairseq, logging numbers with all their
digits; and on a CPU also with parameters sharded."""

import importlib
import numbers
import sys

command = importlib.import_module(f"fairseq_cli.{sys.argv.pop(1)}")  # sets up logging

from fairseq.logging import metrics, progress_bar  # noqa: E402

log_scalar, format_stat = metrics.log_scalar, progress_bar.format_stat


def log_exactly(*args, **kwargs):
    log_scalar(*args, **{**kwargs, "round": 9})


def format_exactly(stat):
    return repr(stat) if isinstance(stat, numbers.Number) else format_stat(stat)


metrics.log_scalar, progress_bar.format_stat = log_exactly, format_exactly

if "fully_sharded" in sys.argv:
    import sharding_on_cpu

    sharding_on_cpu.apply()

if __name__ == "__main__":
    command.cli_main()
