"""A dense model into one whose experts begin as copies of its FFNs.

Komatsuzaki et al. 2023, "Sparse Upcycling", arXiv 2212.05055; for translation, Dua et al. 2022,
arXiv 2110.08246. In strata, the passes after the first begin with a factor of zero (ReZero, arXiv
2003.04887).
"""

import torch

from fairseq_smoe.conversion.dense import (
    describe_layers,
    layer_changes,
    replace_ffns,
    require_plain_dense,
)
from fairseq_smoe.conversion.report import Report, parameters_line
from fairseq_smoe.moe.strata import format_strata

# gates whose weights sum to 1, so that equal experts together are one of them -> other options that
# they need for that
GATES = {"top-k": {}, "threshold": {"moe_threshold_weights": "renormalised"}}


def copy_into_experts(source, strata, gate, layers, noise=0.0, seed=1):
    """Turn FFNs of a dense model into blocks of experts that are copies of the FFN.

    A token visits experts of any stratum already in its first pass, so that they all have to be
    copies. The output of that pass is the FFN's, as the weights of a token's experts sum to 1. The
    outputs of later passes are multiplied by a trained factor that begins at 0.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; it is changed.
        strata: experts of each stratum.
        gate: a name in :data:`GATES`.
        layers: see :func:`~fairseq_smoe.conversion.dense.layer_changes`.
        noise: standard deviation of what is added to the numbers of every expert, relative to their
            root mean square in the tensor.
        seed: of what is drawn.

    Returns:
        :class:`~fairseq_smoe.conversion.report.Report`

    Raises:
        OptionError: the model is not dense, or post-norm; or an option is wrong.
    """
    require_plain_dense(source, "upcycle")
    before = source.num_parameters()
    changes = {"smoe_strata": format_strata(strata)}
    if gate != "top-k":
        changes |= {"moe_gate": gate, **GATES[gate]}
    if len(strata) > 1:
        changes["smoe_pass_scale"] = ",".join(["1"] + ["0"] * (len(strata) - 1))
    source.set_options(**layer_changes(source, **layers), **changes)

    def fill(block, ffn):
        for name, tensor in ffn.items():
            own = tensor.t() if name.endswith(".weight") else tensor
            stacked_E = getattr(block.experts, name.replace(".", "_"))
            stacked_E.copy_(own)
            if noise:
                spread = noise * float(own.double().square().mean().sqrt())
                stacked_E.add_(torch.randn_like(stacked_E), alpha=spread)

    replaced = replace_ffns(source, fill, seed, "copying FFNs")
    facts = {
        "kind": "upcycle",
        "checkpoint": str(source.path),
        "options": source.changes,
        "noise": noise,
        "seed": seed,
        "layers": replaced,
        "parameters": {"before": before, "after": source.num_parameters()},
    }
    lines = [describe_layers(replaced, strata), parameters_line(facts["parameters"])]
    return Report(facts, lines)
