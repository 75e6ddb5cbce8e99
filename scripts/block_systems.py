"""The speed of the systems of docs/systems.md, compared with dense arithmetic of the same FLOPs.

For ``bench_block.py --systems``. Each system is a block with one stratum of 8 experts. What it
computes is counted in multiplications: those of the rows that its experts really had, of weights
that it makes from others, of an FFN that all experts share, and of projections around the block. A
dense FFN sublayer of the model's width gets as many rows as make the same number.
"""

import torch
from benchmarking import in_turns, quartiles, told
from block_contestants import DenseFFN, kept_choices

from fairseq_smoe.accounting.flops import parse_model_options
from fairseq_smoe.moe.arrangements.multi_head import MultiHeadBlock
from fairseq_smoe.moe.doors import build_sublayer
from fairseq_smoe.moe.expert_kinds.adapter import AdapterExperts
from fairseq_smoe.translation.options import check_options

TOKENS = 4096
SYSTEMS = {
    "vanilla MoE": "",
    "XMoE": "--moe-gate threshold --moe-threshold 0.5",
    "XMoE, split 4": "--moe-gate threshold --moe-threshold 0.5 --moe-ffn-split 4",
    "DynMoE": "--moe-gate top-any",
    "HMoE": "--moe-experts sized --moe-gate threshold --moe-threshold 0.6 "
    "--moe-threshold-weights renormalised",
    "MPOE": "--moe-experts tensor-product",
    "MH-MoE": "--moe-heads 4",
    "PESC": "--moe-experts adapter",
}
HEADER = "| system | options | experts per token | efficiency (quartiles) |\n|---|---|---:|---:|"


def make_sublayer(args, options):
    """The FFN sublayer that model options choose, with one stratum of 8 experts."""
    torch.manual_seed(args.seed)
    words = f"--arch smoe_transformer --smoe-strata 8 --moe-expert-backend {args.backend} {options}"
    options = parse_model_options(words.split())
    sublayer = build_sublayer(
        args.embed_dim,
        args.ffn_dim,
        options,
        check_options(options),
        ffn_split=options.moe_ffn_split,
        dropout=0.0,
        activation_dropout=0.0,
        activation_fn=torch.relu,
    )
    return sublayer.to(args.device, args.dtype).train()


def multiplications(sublayer, stats, tokens):
    """Multiplications of a forward pass: one for each number of a row and weight it meets."""
    block = getattr(sublayer, "block", sublayer)
    experts = block.experts
    total = experts.forward_flops() / 2
    shared = isinstance(experts, AdapterExperts)
    if shared:  # its FFN computes every token once, and the adapters only their rows
        ffn = sum(p.numel() for p in experts.ffn.parameters())
        total += tokens * ffn
    for visible, gate in zip(block.visible, stats.gates):
        rows_E = torch.bincount(kept_choices(gate), minlength=len(visible))
        for e, rows in zip(visible, rows_E.tolist()):
            used = experts.params_used(range(e, e + 1), 1)
            total += rows * (used - ffn if shared else used)
    if isinstance(sublayer, MultiHeadBlock):
        total += tokens * (sublayer.head.weight.numel() + sublayer.merge.weight.numel())
    return total


def measure_systems(args, step, progress):
    """Measure each system with :data:`TOKENS`; returns the rows of the table.

    Args:
        step: ``step(module, x)`` runs forward and backward, and returns the module's output.
    """
    results, tokens = [], TOKENS
    shape = tokens, args.embed_dim
    x = torch.randn(shape, device=args.device, dtype=args.dtype, requires_grad=True)
    dense = DenseFFN(args.embed_dim, args.ffn_dim).to(args.device, args.dtype)
    of_a_row = sum(p.numel() for name, p in dense.named_parameters() if "norm" not in name)
    for name, options in SYSTEMS.items():
        progress.set_description(name)
        sublayer = make_sublayer(args, options)
        with torch.no_grad():
            _, stats = sublayer(x)
        rows = round(multiplications(sublayer, stats, tokens) / of_a_row)
        dense_x = x.new_empty(rows, args.embed_dim).normal_().requires_grad_()
        ratios = in_turns(
            lambda: step(dense, dense_x), lambda: step(sublayer, x), args.rounds, progress
        )
        visits = sum(int(gate.num_visits) for gate in stats.gates)
        results.append(
            {
                "system": name,
                "options": options,
                "experts_per_token": visits / tokens,
                "efficiency": dict(zip(("low", "median", "high"), quartiles(ratios))),
            }
        )
    return results


def as_markdown(results):
    lines = [HEADER]
    for r in results:
        lines.append(
            f"| {r['system']} | `{r['options']}` | {r['experts_per_token']:.2f} "
            f"| {told(**r['efficiency'])} |"
        )
    return "\n".join(lines).replace("``", "")
