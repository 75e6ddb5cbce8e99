"""How fast models translate on a CPU, beside CTranslate2.

Translates made-up sentences of 25 tokens into as many, with untrained models: the rows of a table,
in float32 and with weights in 8 bits, and the dense model as CTranslate2 runs it, where that is
installed. All take turns in one process. Example:

    pip install ".[ctranslate2]"
    python scripts/bench_latency.py --sentences 1
"""

import importlib.util
import tempfile
from functools import partial

import torch
from benchmarking import build, make_parser, publish, quartiles, seconds, start, told
from tqdm import tqdm

from fairseq_smoe.accounting.flops import count_row


def main():
    parser = make_parser(__doc__, tokens=1000, rounds=9)
    parser.set_defaults(threads=1, cpu=True, rows=["smoe-2-2-2-2", "vanilla-moe"])
    parser.add_argument("--beam", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=1, help="at a time (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=25, help="of sentences, in tokens (default: %(default)s)"
    )
    args = parser.parse_args()
    benchmark, rows, _ = start(args)
    dense = benchmark.rows[0]
    jobs = {}
    for row in (dense, *(row for row in rows if row != dense)):
        jobs[f"{row.name}, float32"] = our_job(benchmark, row, args, int8=False)
        jobs[f"{row.name}, int8"] = our_job(benchmark, row, args, int8=True)
    if importlib.util.find_spec("ctranslate2"):
        jobs |= ctranslate2_jobs(benchmark, dense, args)
    flops = {
        f"{row.name}, float32": count_row(benchmark, row, args.scale)[1] for row in (dense, *rows)
    }
    first = f"{dense.name}, float32"
    results = measure(jobs, first, args.rounds)
    for result in results:
        if result["model"] in flops:
            result["flops"] = flops[result["model"]] / flops[first]
    publish(table(results, benchmark, args), args, {"results": results}, None)


def our_job(benchmark, row, args, int8):
    """A function that translates with a row's model as ``translate`` does."""
    from fairseq.sequence_generator import SequenceGenerator

    from fairseq_smoe.evaluation.int8 import quantise
    from fairseq_smoe.evaluation.lean_beam import make_lean
    from fairseq_smoe.evaluation.reordered import can_reorder, reorder

    _, task, model, _ = build(benchmark, row, args, use_cuda=False)
    model.eval()
    if int8:
        quantise(model)
    elif can_reorder(torch.device("cpu")):
        reorder(model)
    dictionary = task.source_dictionary
    source = sources(dictionary, args)
    lengths = torch.full((len(source),), args.length)
    sample = {"net_input": {"src_tokens": source, "src_lengths": lengths}}
    generator = SequenceGenerator(
        [model], dictionary, beam_size=args.beam, max_len_b=args.length, min_len=args.length
    )
    make_lean(generator, [model])
    generator.eval()

    def translate():
        with torch.inference_mode():
            return generator.generate([model], sample)

    return translate


def ctranslate2_jobs(benchmark, row, args):
    """``{name: function}`` that translate with CTranslate2."""
    import ctranslate2

    from fairseq_smoe.export.ctranslate2 import specification

    cfg, task, model, _ = build(benchmark, row, args, use_cuda=False)
    dictionary = task.source_dictionary
    texts = [[dictionary[token] for token in line[:-1]] for line in sources(dictionary, args)]
    jobs = {}
    with tempfile.TemporaryDirectory() as folder:
        spec = specification(model.eval(), cfg.model, dictionary)
        spec.optimize()
        spec.save(folder)
        for kind in ("float32", "int8"):
            translator = ctranslate2.Translator(
                folder, compute_type=kind, intra_threads=args.threads, inter_threads=1
            )
            jobs[f"{row.name}, CTranslate2 {kind}"] = partial(
                translator.translate_batch,
                texts,
                beam_size=args.beam,
                max_decoding_length=args.length,
                min_decoding_length=args.length,
            )
    return jobs


def sources(dictionary, args):
    """(sentences, length) tokens, with the end of the sentence."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = args.sentences, args.length - 1
    words = torch.randint(dictionary.nspecial, len(dictionary), shape, generator=generator)
    return torch.cat([words, torch.full((args.sentences, 1), dictionary.eos())], dim=1)


def measure(jobs, first, rounds):
    """Ratios of times: the median over rounds of that of ``first`` divided by that of each job."""
    taken = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in tqdm(range(rounds), unit="round"):
        for name, job in jobs.items():
            taken[name].append(seconds(job))
    results = []
    for name, own in taken.items():
        low, median, high = quartiles([base / t for base, t in zip(taken[first], own)])
        results.append({"model": name, "speed": median, "quartiles": [low, high]})
    return results


def table(results, benchmark, args):
    sentences = "one sentence" if args.sentences == 1 else f"{args.sentences} sentences"
    title = (
        f"{benchmark.title}, scale {args.scale}, {sentences} of {args.length} tokens, "
        f"beam {args.beam}, {args.threads} thread{'s'[: args.threads > 1]}"
    )
    lines = [
        f"| {title} | tokens a second relative to dense (quartiles) | FLOPs |",
        "|---|---:|---:|",
    ]
    for r in results:
        flops = f"{r['flops']:.2f}" if "flops" in r else ""
        lines.append(f"| {r['model']} | {told(r['speed'], *r['quartiles'])} | {flops} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
