"""The steps of ``convert moefy``."""

from statistics import mean

from tqdm import tqdm

from fairseq_smoe import __version__
from fairseq_smoe.analysis.passes import seed_of
from fairseq_smoe.checkpoints.parts import NAMES
from fairseq_smoe.conversion.moefy import samples
from fairseq_smoe.conversion.moefy.ffns import find_ffns, numbers, replace_parameters
from fairseq_smoe.conversion.moefy.router import fit
from fairseq_smoe.conversion.moefy.split import split
from fairseq_smoe.conversion.moefy.work import Work
from fairseq_smoe.conversion.report import Report
from fairseq_smoe.conversion.text import Text
from fairseq_smoe.evaluation.saved_model import identify
from fairseq_smoe.text_table import aligned

OPTIONS = (
    *("data", "subset", "max_sentences", "max_tokens", "router_tokens", "seed"),
    *("moefy_split", "moefy_select"),
)


def moefy(source, args):
    """Split networks of ``source``, in place.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`
        args: options of ``commands/convert/moefy.py``, and ``output``.

    Returns:
        :class:`~fairseq_smoe.conversion.report.Report`

    Raises:
        OptionError: the model or its text does not allow it.
    """
    ffns = find_ffns(source, args.layers)
    num_experts, kept = numbers(ffns, args.moefy_experts, args.moefy_k)
    options = {name: getattr(args, name) for name in OPTIONS}
    options["data"] = None if args.data is None else str(args.data.resolve())
    options |= {"moefy_experts": num_experts, "kept": kept}
    work = Work(
        args.output,
        {
            "version": __version__,
            "checkpoint": identify(source.path),
            "ffns": [ffn.name for ffn in ffns],
            "options": options,
        },
    )
    with work.opened():
        fitted = _fit_all(source, args, work, ffns, num_experts, kept)
    replace_parameters(source, ffns, fitted)
    source.state.pop(NAMES, None)  # of the optimizer's state
    dense = any(ffn.expert is None for ffn in ffns)
    experts = any(ffn.expert is not None for ffn in ffns)
    source.set_options(
        **({"moe_experts": "moefied"} if experts else {}),
        **({"moefy_dense": True} if dense else {}),
        moefy_experts=num_experts,
        moefy_k=args.moefy_k,
        moefy_select=args.moefy_select,
    )
    return _report(args, ffns, fitted, num_experts, kept, work)


def _fit_all(source, args, work, ffns, num_experts, kept):
    """What is kept of every network, fitted or read from the work folder."""
    waiting = [i for i in range(len(ffns)) if work.result(i) is None]
    if waiting and not samples.is_drawn(work.folder):
        text = Text(source.path, args)
        samples.draw(text, ffns, work.folder, args.router_tokens, args.seed)
        del text  # the model, from memory
    with tqdm(total=len(ffns), initial=len(ffns) - len(waiting), unit="FFN", disable=None) as bar:
        for i in waiting:
            bar.set_description(ffns[i].name)
            work.keep(i, _fit(source, args, work.folder, i, ffns[i], num_experts, kept))
            samples.drop(work.folder, i)
            bar.update()
    return [work.result(i) for i in range(len(ffns))]


def _fit(source, args, folder, i, ffn, num_experts, kept):
    weight_FD, bias_F = ffn.first_layer(source)
    tokens_TD, offered = samples.load(folder, i)
    seed = args.seed + seed_of(ffn.name)
    order_F = split(args.moefy_split, weight_FD, bias_F, tokens_TD, num_experts, seed)
    router, coverage = fit(
        args.moefy_select,
        weight_FD[order_F].unflatten(0, (num_experts, -1)),
        bias_F[order_F].unflatten(0, (num_experts, -1)),
        tokens_TD,
        kept,
        seed,
    )
    return {"order": order_F, "router": router, "coverage": coverage, "tokens": offered}


def _report(args, ffns, fitted, num_experts, kept, work):
    facts = {
        "kind": "moefy",
        "split": args.moefy_split,
        "select": args.moefy_select,
        "small_experts": num_experts,
        "kept": kept,
        "ffns": [
            {"name": ffn.name, "tokens": result["tokens"], "coverage": result["coverage"]}
            for ffn, result in zip(ffns, fitted)
        ],
    }
    widths = sorted({ffn.hidden_dim // num_experts for ffn in ffns})
    lines = [
        f"{len(ffns)} FFNs in {num_experts} small experts each, of "
        f"{' or '.join(map(str, widths))} hidden units",
        f"kept by a token: {kept} ({kept / num_experts:.0%}), chosen by {args.moefy_select}; "
        "share of the activation that they hold, a mean over the FFNs:",
        "",
        *_coverage_table(ffns, fitted, num_experts),
        "",
    ]
    unseen = [ffn.name for ffn, result in zip(ffns, fitted) if not result["tokens"]]
    if unseen:
        lines.append(f"warning: no token of the text came to {', '.join(unseen)}")
    return Report(facts, lines, remove=work.remove)


def _coverage_table(ffns, fitted, num_experts):
    """Rows: numbers of small experts; columns: router and oracle of each part of the model."""
    groups = {}
    for ffn, result in zip(ffns, fitted):
        kind = "dense" if ffn.expert is None else "experts"
        if result["coverage"]:
            groups.setdefault(f"{ffn.sublayer.side}, {kind}", []).append(result["coverage"])
    header = ["kept", *(f"{name}: {who}" for name in groups for who in ("router", "oracle"))]
    rows = []
    counts = [row["kept"] for row in next(iter(groups.values()))[0]] if groups else []
    for j, count in enumerate(counts):
        cells = [f"{count} ({count / num_experts:.0%})"]
        for found in groups.values():
            for who in ("router", "oracle"):
                cells.append(f"{mean(coverage[j][who] for coverage in found):.3f}")
        rows.append(cells)
    return aligned(header, rows, left=1)
