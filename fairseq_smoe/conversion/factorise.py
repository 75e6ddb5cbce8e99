"""The experts of a mixture as products of tensors, the largest of which they have in common (MPOE,
arXiv 2203.01104)."""

from statistics import mean

import torch
from tqdm import tqdm

from fairseq_smoe.conversion.common_central import SWEEPS, factorise_together
from fairseq_smoe.conversion.report import Report, parameters_line
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_kinds.tensor_product import LAYERS, TensorProductOptions
from fairseq_smoe.moe.strata import own_experts
from fairseq_smoe.text_table import aligned
from fairseq_smoe.translation.options import check_options, pool_of


def factorise_experts(source, options, sweeps=SWEEPS, noise=0.0, seed=1):
    """Turn all experts into
    :class:`~fairseq_smoe.moe.expert_kinds.tensor_product.TensorProductExperts`.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; it is changed.
        options: of the new experts, by their names in the checkpoint.
        sweeps: see :func:`~fairseq_smoe.conversion.common_central.factorise_together`.
        noise: standard deviation of what is added to the experts' own tensors, relative to their
            root mean square.
        seed: of the noise.

    Returns:
        :class:`~fairseq_smoe.conversion.report.Report`

    Raises:
        OptionError: the model has no experts, or others than plain FFNs; or an option is wrong.
    """
    source.require_experts("factorise")
    if source.options.moe_experts != "ffn":
        raise OptionError(
            f"{source.path}: has experts of --moe-experts {source.options.moe_experts}; factorise "
            "starts from those of --moe-experts ffn"
        )
    before = source.num_parameters()
    source.set_options(moe_experts="tensor-product", **options)
    strata = pool_of(source.options, check_options(source.options))
    chosen = TensorProductOptions.of(source.options)
    by_stratum = chosen.mpo_share == "stratum"
    sharing = own_experts(strata) if by_stratum else [range(sum(strata))]
    names = [f"{block.name}.experts" for block in source.blocks()]
    # before the work, as shapes may not fit
    factors = {name: chosen.shapes(*source.shape(f"{name}.fc1_weight")[1:]) for name in names}
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for name in tqdm(names, unit="block", desc="factorising", disable=None):
        (in_shape, out_shape), own = factors[name], errors.setdefault(name, {})
        for layer, shapes in zip(LAYERS, ((in_shape, out_shape), (out_shape, in_shape))):
            own[layer] = _factorise(source, name, layer, shapes, sharing, chosen.mpo_bond, sweeps)
            if chosen.mpo_bias == "common":
                own[f"{layer}_bias"] = _join_biases(source, name, layer, sharing)
            _add_noise(source, f"{name}.{layer}_tensor", noise, generator)
    facts = {
        "kind": "factorise",
        "checkpoint": str(source.path),
        "options": source.changes,
        "sweeps": sweeps,
        "noise": noise,
        "seed": seed,
        "relative errors": errors,
        "parameters": {"before": before, "after": source.num_parameters()},
    }
    lines = [
        "relative error (Frobenius norm) of the experts' weights, before any noise:",
        *_table(errors),
        parameters_line(facts["parameters"]),
    ]
    return Report(facts, lines)


def _factorise(source, name, layer, shapes, sharing, bond, sweeps):
    """Replace a layer's weights by tensors. Returns the relative error of every expert."""
    weight_EIO = source.take(f"{name}.{layer}_weight")
    found = [
        factorise_together(weight_EIO[own.start : own.stop], *shapes, bond, sweeps)
        for own in sharing
    ]
    del source.parameters[f"{name}.{layer}_weight"]
    for k, parts in enumerate(zip(*(tensors for tensors, _ in found))):
        central = k == len(shapes[0]) // 2
        place = f"common.{layer}_central" if central else f"{layer}_tensor{k + 1}"
        whole = torch.stack(parts) if central else torch.cat(parts)
        source.parameters[f"{name}.{place}"] = whole.to(weight_EIO.dtype)
    return [error for _, missed in found for error in missed]


def _join_biases(source, name, layer, sharing):
    """Replace a layer's biases by their means. Returns the relative error of every expert's."""
    bias_EO = source.take(f"{name}.{layer}_bias")
    exact_EO = bias_EO.double()
    mean_SO = torch.stack([exact_EO[own.start : own.stop].mean(0) for own in sharing])
    del source.parameters[f"{name}.{layer}_bias"]
    source.parameters[f"{name}.common.{layer}_bias"] = mean_SO.to(bias_EO.dtype)
    means_EO = mean_SO.repeat_interleave(torch.tensor([len(own) for own in sharing]), dim=0)
    errors_E = (exact_EO - means_EO).norm(dim=1) / exact_EO.norm(dim=1).clamp(min=1e-300)
    return errors_E.tolist()


def _add_noise(source, start, noise, generator):
    for name in [name for name in source.parameters if noise and name.startswith(start)]:
        tensor_E = source.parameters[name]
        exact_E = tensor_E.double()
        drawn_E = torch.randn(tensor_E.shape, generator=generator, dtype=torch.float64)
        exact_E += noise * exact_E.square().mean().sqrt() * drawn_E
        source.parameters[name] = exact_E.to(tensor_E.dtype)


def _table(errors):
    """The mean error of a block's experts, and the greatest."""
    parts = list(next(iter(errors.values())))
    header = ["block", *(f"{part} {which}" for part in parts for which in ("mean", "max"))]
    rows = []
    for name, own in errors.items():
        numbers = [f"{which(own[part]):.2g}" for part in parts for which in (mean, max)]
        rows.append([name.removesuffix(".experts"), *numbers])
    return aligned(header, rows, left=1)
