"""The figures of :mod:`fairseq_smoe.accounting.scaling` as a table."""

from fairseq_smoe.accounting.flops import build_on_meta
from fairseq_smoe.accounting.scaling import (
    expected_activation_bytes,
    handed_bytes,
    measure,
    sent_bytes,
    state_bytes,
)
from fairseq_smoe.benchmarks import benchmark as benchmarks
from fairseq_smoe.benchmarks.training_command import model_options, vocab_size
from fairseq_smoe.errors import OptionError
from fairseq_smoe.moe.expert_group import default_group_size
from fairseq_smoe.moe.strata import format_strata

HEADER = (
    "| {} | ranks | share experts | experts of a block on a rank | exchanged, KB a token "
    "| sent in an update, MB: rows | shared gradients | expert gradients | sum | busiest rank "
    "| memory, GB: parameters, optimizer | blocks' activations |"
)


def scaling_table(args):
    """Markdown, from the arguments of ``python -m fairseq_smoe scaling``."""
    benchmark = benchmarks.load(args.benchmark)
    rows = [benchmark.row(name) for name in args.rows] or benchmark.rows
    lines = [HEADER.format(benchmark.title), "|---|" + "---:|" * (HEADER.count("|") - 2)]
    for row in rows:
        options = model_options(benchmark, row, "paper")
        model, _ = build_on_meta(options, vocab_size(benchmark, "paper"))
        sizes = measure(model)
        lines += [f"| {row.name} | {ranks} {_cells(sizes, ranks, args)}" for ranks in args.ranks]
    return "\n".join(lines)


def group_size(sizes, ranks, asked=None):
    """N, as a training would choose it.

    Raises:
        OptionError: --expert-parallel-size does not divide the ranks, or the experts.
    """
    experts = sizes.num_experts
    if not experts:
        return 1
    if asked is None:
        return default_group_size(ranks, sizes.blocks[0].strata)
    if asked < 1 or ranks % asked or experts % asked:
        fitting = [n for n in range(1, ranks + 1) if ranks % n == experts % n == 0]
        raise OptionError(
            f"--expert-parallel-size {asked}: does not divide {ranks} ranks and the {experts} "
            f"experts of {format_strata(sizes.blocks[0].strata)}; expected one of "
            f"{', '.join(map(str, fitting))}"
        )
    return asked


def _cells(sizes, ranks, args):
    size = group_size(sizes, ranks, args.expert_parallel_size)
    steps, recomputed = args.update_freq, args.checkpoint_activations
    tokens, number_bytes = args.tokens_per_rank, args.bytes
    handed = handed_bytes(sizes, ranks, size, tokens, number_bytes, steps, recomputed)
    sent = sent_bytes(handed, ranks, size)
    state = state_bytes(sizes, ranks, size, number_bytes)
    kept = expected_activation_bytes(sizes, size, tokens, number_bytes, recomputed)
    slowdown = max((block.slowdown(size) for block in sizes.blocks), default=1)
    cells = [
        size if sizes.blocks else "",
        sizes.num_experts // size,
        f"{handed.exchange / steps / tokens / 1e3:.0f}",
        *(f"{b / 1e6:.0f}" for b in (sent.exchange, sent.shared, sent.experts, sent.total)),
        f"{slowdown:.2f}x",
        f"{state.total / 1e9:.1f}",
        f"{kept / 1e9:.1f}",
    ]
    return "".join(f"| {cell} " for cell in cells) + "|"
