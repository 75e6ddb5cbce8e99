"""Check that a checkpoint belongs to the row of the paper's table that was named."""

from dataclasses import fields

from fairseq_smoe.accounting.flops import parse_model_options
from fairseq_smoe.benchmarks.training_command import model_options
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.strata import format_strata
from fairseq_smoe.translation.options import RoutingOptions, check_options, resolve_strata

_WITHOUT_EFFECT = {"moe_gating_use_fp32", "moe_expert_backend"}


def check_row(benchmark, row, scale, saved):
    """Compare the options that choose and shape expert layers.

    Args:
        benchmark, row, scale: as for ``training_command.model_options``.
        saved: a :class:`~fairseq_smoe.evaluation.saved_model.SavedModel`.

    Raises:
        OptionError: they differ; names the option and both values.
    """
    training = {option: value for option, (value, _source) in benchmark.training.items()}
    words = [word for pair in training.items() for word in pair]
    expected = _routing(parse_model_options([*words, *model_options(benchmark, row, scale)]))
    found = _routing(saved.model_options)
    for name, value in expected.items():
        if found[name] != value:
            raise OptionError(
                f"--{name.replace('_', '-')}: {saved.path} was trained with {found[name]}, "
                f"the row {row.slug} of {benchmark.name} has {value}; name the row that it was "
                "trained for, or evaluate it as a model of your own with --run and --checkpoint"
            )


def _routing(options):
    """``{option: value}``; --moe-expert-count 8 is turned into --smoe-strata 8."""
    values = {
        field.name: getattr(options, field.name, field.default)
        for field in fields(RoutingOptions)
        if field.name not in _WITHOUT_EFFECT and not field.name.startswith("_")
    }
    values["smoe_strata"] = None
    if check_options(options) is not None:
        values["smoe_strata"] = format_strata(resolve_strata(options))
    del values["moe_expert_count"]
    return values
