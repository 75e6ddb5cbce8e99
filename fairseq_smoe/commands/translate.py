"""Translate text, line by line."""

import os
from pathlib import Path

from fairseq_smoe.errors import OptionError
from fairseq_smoe.evaluation.defaults import CPU_TOKENS, MOST_CPU_PROCESSES
from fairseq_smoe.evaluation.ranks import END, Ranks
from fairseq_smoe.inference.line_files import FORMATS, INVALID_UTF8, Job, translate_lines
from fairseq_smoe.inference.line_ranks import translate_lines_on_ranks
from fairseq_smoe.inference.loading import add_loading_options
from fairseq_smoe.inference.long_text import LONG_TEXT


def add_arguments(parser):
    parser.epilog = "docs/translate.md has examples."
    add_loading_options(parser)
    parser.add_argument("--source", required=True, metavar="LANG", help="language of the text")
    parser.add_argument("--target", required=True, metavar="LANG", help="language to translate to")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="UTF-8 text, a sentence a line (default: stdin)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="line N is the translation of line N; a command that was stopped goes on with it "
        "(default: stdout)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="text",
        help="text: translations, and scores behind them, joined by tabs; jsonl: a JSON object a "
        "line, with the source (default: %(default)s)",
    )
    parser.add_argument(
        "--invalid-utf8",
        choices=INVALID_UTF8,
        default="error",
        help="what to do with bytes that are no UTF-8 (default: %(default)s)",
    )
    add_search_options(parser)
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="each translates lines of its own (default: one per core, at most "
        f"{MOST_CPU_PROCESSES}; one on a GPU)",
    )
    group.add_argument(
        "--max-tokens", type=int, default=CPU_TOKENS, metavar="N", help="source tokens of a batch"
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=2000,
        metavar="N",
        help="lines read at a time, of which similar ones are translated together (default: "
        "%(default)s)",
    )


def add_search_options(parser):
    group = parser.add_argument_group("translations", "names and defaults are fairseq-generate's")
    group.add_argument("--beam", type=int, default=5, help="(default: %(default)s)")
    group.add_argument("--n-best", type=int, default=1, metavar="N", help="translations a line")
    group.add_argument("--lenpen", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--sampling-topp", type=float, metavar="P", help="draw translations instead of searching"
    )
    group.add_argument(
        "--max-len", type=int, default=200, metavar="N", help="tokens of a translation at most"
    )
    group.add_argument(
        "--long-text",
        choices=LONG_TEXT,
        default="split",
        help="what to do with a line that is too long for the model (default: %(default)s into "
        "sentences)",
    )
    group.add_argument("--with-scores", action="store_true", help="write scores, too")


def search_options(args):
    """The arguments of ``Translator.translate`` that :func:`add_search_options` has read."""
    names = ("beam", "n_best", "lenpen", "sampling_topp", "max_len", "long_text", "with_scores")
    return {name: getattr(args, name) for name in names}


def run(args):
    from fairseq_smoe import Translator

    with Ranks.of_torchrun() as ranks:
        device, processes = args.device, args.processes
        if ranks is not None:
            device, processes = _of_rank(args, ranks), 1
        elif processes is None:
            cores = min(len(os.sched_getaffinity(0)), MOST_CPU_PROCESSES)
            processes = cores if device == "cpu" else 1
        for flag, value in (("--processes", processes), ("--chunk", args.chunk)):
            if value < 1:
                raise OptionError(f"{flag} {value}: expected 1 or more")
        if processes > 1 and device != "cpu":
            raise OptionError(f"--processes {processes} with --device {device}: expected 1")
        job = Job(
            args.source,
            args.target,
            {**search_options(args), "max_tokens": args.max_tokens},
            args.format,
            args.invalid_utf8,
            args.chunk,
        )

        def make_translator():
            # a thread pool that exists before a fork does not work in the child
            threads = 1 if processes > 1 else None
            translator = Translator.load(
                args.model, args.data, device, threads=threads, dtype=args.dtype
            )
            translator.check(args.source, args.target, **job.options)
            return translator

        if ranks is None:
            translate_lines(make_translator, job, args.input, args.output, processes)
        else:
            translate_lines_on_ranks(ranks, make_translator, job, args.input, args.output)
            if not ranks.is_first:
                ranks.ask(END)


def _of_rank(args, ranks):
    """The device of this rank."""
    ranks.check_processes(args.processes)
    if args.device == "cpu":
        return args.device
    if args.device != "cuda":
        raise OptionError(f"--device {args.device}: each rank has its own; give cuda or cpu")
    import torch

    return str(ranks.gpu(torch.cuda.device_count(), "--device cpu"))
