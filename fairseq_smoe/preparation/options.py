"""Options of ``python -m fairseq_smoe prepare``, grouped by step."""

from fairseq_smoe.benchmarks import benchmark
from fairseq_smoe.benchmarks.cleaning import CLEANINGS, Rules
from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.preparation.pool import available_cores
from fairseq_smoe.preparation.sources import FLORES200_URL, M15_SOURCE, OPUS100_URL

# options that determine the output of each step, which also depends on those of earlier steps
STEP_OPTIONS = {
    "fetch": ("benchmark", "sources", "pairs", "splits", "recipe"),
    "verify": ("invalid_utf8",),
    "clean": (
        *("cleaning", "empty", "identical", "max_length", "max_length_ratio"),
        *("held_out", "duplicates"),
    ),
    "sentencepiece": (
        *("vocab_size", "character_coverage", "temperature", "sample_lines", "seed"),
        "vocabulary_of",
    ),
    "encode": (),
    "binarise": ("lines_per_shard",),
    "report": (),
}
STEPS = tuple(STEP_OPTIONS)
FLAGS = {"sources": "--from", "cleaning": "--clean"}  # where they are not named like the option
# steps that leave nothing behind if they fail, so that other options may be tried next
FREE_AFTER_FAILURE = ("fetch", "verify", "sentencepiece")


def flag(name):
    """The flag of an option."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def add_arguments(parser):
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes to clean, encode and binarise with (default: all cores, %(default)s)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run the work on the workers of this Dask scheduler, e.g. tcp://host:8786, which have "
        "to see all folders under the same names; 'slurm' submits --workers workers to SLURM, as "
        "~/.config/dask/jobqueue.yaml says (docs/scale.md; default: this machine)",
    )
    parser.add_argument(
        "--piece-lines",
        type=int,
        default=1_000_000,
        metavar="N",
        help="lines of a pair that a process cleans at a time, in 100 bytes of memory each; pairs "
        "with more are cleaned by several (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=STEPS,
        metavar="STEP",
        help=f"run these alone, of {', '.join(STEPS)}, with the other options as before "
        "(default: all)",
    )
    parser.add_argument(
        "--redo",
        choices=STEPS,
        metavar="STEP",
        help="first remove the output of STEP and of all later steps, as after a change of options",
    )
    _add_text(parser.add_argument_group("what text"))
    _add_download(parser.add_argument_group("where published text comes from"))
    _add_clean(
        parser.add_argument_group(
            "clean",
            "What to drop from the training text. The report counts it rule by rule, and says how "
            "much of what is left overlaps with the validation and test text.",
        )
    )
    _add_vocabulary(parser.add_argument_group("SentencePiece"))
    _add_binary(parser.add_argument_group("binarise"))


def _add_text(group):
    group.add_argument(
        "--benchmark",
        help=f"one of the paper's, {', '.join(benchmark.PAPERS)}, or a .json file like theirs: sets "
        "languages, splits, vocabulary, temperature and source",
    )
    group.add_argument(
        "--scale",
        choices=SCALES,
        default="paper",
        help="with --benchmark: the size of the vocabulary, as for training at this scale "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        metavar="PATH",
        help="folders or archives (.tar, .tar.gz, .tgz, .tar.xz, .tar.bz2, .zip) with text, one "
        "sentence a line, in files named PREFIX.en-de.de or opus.en-de-PREFIX.de anywhere inside; "
        "the first that has a pair wins",
    )
    group.add_argument(
        "--pairs", metavar="A-B,...", help="language pairs; both directions of each can be trained"
    )
    group.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME=PREFIX",
        help="which files make which split: train, valid, test, test1, ... (default: train=train "
        "valid=valid test=test; valid=dev in a benchmark)",
    )
    group.add_argument(
        "--with-train-only-pairs",
        action="store_true",
        help="OPUS-100: also the 5 languages that have no text to test on",
    )
    group.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out pairs for which no training text is found, instead of failing",
    )


def _add_download(group):
    group.add_argument(
        "--base-url",
        dest="data_address",
        metavar="URL",
        help="OPUS-100: folder of the archives; M4, M15: address of the training text, gdrive:ID "
        f"for a file on Google Drive (default: {OPUS100_URL}, {M15_SOURCE})",
    )
    group.add_argument(
        "--flores-url",
        dest="flores_address",
        default=FLORES200_URL,
        metavar="URL",
        help="M4, M15: Flores-200, to validate and test on (default: %(default)s)",
    )
    group.add_argument(
        "--recipe",
        metavar="FILE",
        help="M4, M15: take the training text from these published corpora, through mtdata",
    )
    group.add_argument(
        "--connections",
        type=int,
        default=4,
        metavar="N",
        help="downloads at a time (default: %(default)s)",
    )


def _add_clean(group):
    default, none = Rules(), CLEANINGS["none"]

    def add(option, text, **how):
        name = option[2:].replace("-", "_")
        values = f"default: {getattr(default, name)}"
        if getattr(none, name) != getattr(default, name):
            values += f", or {getattr(none, name)} with --clean none"
        group.add_argument(option, help=f"{text} ({values})", **how)

    drop_or_keep = {"choices": ("drop", "keep")}
    group.add_argument(
        "--clean",
        choices=CLEANINGS,
        help="default: by all rules below; none: drop only pairs with an empty side. The options "
        "below change single rules (default: the benchmark's, which is none for the paper's; "
        "default for text of your own and for --recipe)",
    )
    add(
        "--invalid-utf8",
        "lines that are not UTF-8, in any split: stop and name the first, or drop them",
        choices=("error", "drop"),
    )
    add("--empty", "pairs with an empty side", **drop_or_keep)
    add("--identical", "pairs of two equal sides", **drop_or_keep)
    add(
        "--max-length",
        "drop pairs with more characters on a side; 0: no limit",
        type=int,
        metavar="N",
    )
    add(
        "--max-length-ratio",
        "drop pairs with a side more than R times as long as the other, in characters; 0: no limit",
        type=float,
        metavar="R",
    )
    add(
        "--held-out",
        "pairs with a side that is in the validation or test text of its language, in any pair, "
        "ignoring case, width and spaces",
        **drop_or_keep,
    )
    add("--duplicates", "all but the first of equal pairs", **drop_or_keep)


def _add_vocabulary(group):
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="pieces of the joint vocabulary (default: 32000, or the benchmark's); with "
        "--vocabulary-of, of each new language, 0 for none (default: 4000)",
    )
    group.add_argument(
        "--vocabulary-of",
        metavar="DIR",
        help="keep the vocabulary and languages of a folder that prepare has made. A language that "
        "it lacks gets a SentencePiece model of its own, whose pieces come behind those that are "
        "there, and the language's token behind them",
    )
    group.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="share of the text's characters that the vocabulary covers (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="a language is drawn with probability proportional to its share of the lines to the "
        "power 1/T, here and in the report (default: 1, or the benchmark's)",
    )
    group.add_argument(
        "--sample-lines",
        type=int,
        default=1_000_000,
        metavar="N",
        help="lines to train SentencePiece on, drawn at random (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=1, help="seed of this sample (default: %(default)s)"
    )


def _add_binary(group):
    group.add_argument(
        "--lines-per-shard",
        type=int,
        default=0,
        metavar="N",
        help="split the training text of larger pairs into shard000, shard001, ..., of which each "
        "epoch reads one (default: 0, no shards)",
    )
