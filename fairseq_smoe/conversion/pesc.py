"""A dense model into one with adapters on its FFNs (PESC, arXiv 2401.02731)."""

from fairseq_smoe.conversion.dense import (
    describe_layers,
    layer_changes,
    replace_ffns,
    require_plain_dense,
)
from fairseq_smoe.conversion.report import Report, parameters_line
from fairseq_smoe.moe.strata import format_strata


def add_adapters(source, strata, options, layers, seed=1):
    """Turn FFNs of a dense model into blocks that share the FFN and have one adapter per expert.

    The adapters' output weights start as zero, so the new model computes what the dense one does,
    whatever its gates (see :class:`~fairseq_smoe.moe.expert_kinds.adapter.AdapterExperts`). Gates
    and the adapters' input weights are drawn.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; it is changed.
        strata: experts of each stratum.
        options: other options of the new model, by their names in the checkpoint.
        layers: see :func:`~fairseq_smoe.conversion.dense.layer_changes`.
        seed: of what is drawn.

    Returns:
        :class:`~fairseq_smoe.conversion.report.Report`

    Raises:
        OptionError: the model is not dense, or post-norm; or an option is wrong.
    """
    require_plain_dense(source, "pesc")
    before = source.num_parameters()
    source.set_options(
        **layer_changes(source, **layers),
        smoe_strata=format_strata(strata),
        moe_experts="adapter",
        **options,
    )

    def fill(block, ffn):
        block.experts.ffn.load_state_dict(ffn)

    replaced = replace_ffns(source, fill, seed, "adding adapters")
    facts = {
        "kind": "pesc",
        "checkpoint": str(source.path),
        "options": source.changes,
        "seed": seed,
        "layers": replaced,
        "parameters": {"before": before, "after": source.num_parameters()},
    }
    lines = [describe_layers(replaced, strata), parameters_line(facts["parameters"])]
    return Report(facts, lines)
