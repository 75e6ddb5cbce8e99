"""The fairseq-train command of a row of the paper's tables, at a scale."""

import shlex

from fairseq_smoe.benchmarks.scale import SCALES
from fairseq_smoe.errors import OptionError
from fairseq_smoe.plugin_folder import PLUGIN_FOLDER

WIDTHS = ("--moe-ffn-dim", "--pesc-adapter-dim")  # options of rows that follow the scale


def model_options(benchmark, row, scale):
    """Options that choose the model.

    Args:
        benchmark: a :class:`~fairseq_smoe.benchmarks.benchmark.Benchmark`.
        row: one of its rows.
        scale: a name in ``SCALES``.
    """
    options = [
        "--arch",
        benchmark.training["--arch"][0],
        "--moe-freq",
        benchmark.training["--moe-freq"][0],
    ]
    shrink = SCALES[scale]
    if scale != "paper" or not benchmark.table:  # the paper's sizes are those of the architectures
        layers = benchmark.size["layers"]
        layers = str(layers if scale == "paper" else min(layers, shrink.layers))
        heads = str(max(1, benchmark.size["attention_heads"] // shrink.heads))
        options += [
            *("--encoder-layers", layers, "--decoder-layers", layers),
            *("--encoder-embed-dim", str(benchmark.size["embed_dim"] // shrink.width)),
            *("--encoder-ffn-embed-dim", str(benchmark.size["ffn_embed_dim"] // shrink.width)),
            *("--encoder-attention-heads", heads, "--decoder-attention-heads", heads),
        ]
    own = shlex.split(row.options)
    for i, option in enumerate(own[:-1]):
        if option in WIDTHS:
            own[i + 1] = str(int(own[i + 1]) // shrink.width)
    return options + own


def vocab_size(benchmark, scale):
    """Pieces of the vocabulary at a scale."""
    return benchmark.vocab_size // SCALES[scale].vocabulary


def batch_tokens(benchmark, scale):
    """Target tokens of an update at a scale."""
    return benchmark.batch_tokens // SCALES[scale].batch


def split_batch(tokens, processes, most, longest):
    """Share the tokens of an update among processes and steps.

    Args:
        tokens: target tokens per update, padding included.
        processes: number of processes that train together.
        most: the most tokens that a process takes at a time, as its memory allows.
        longest: tokens of the longest sentence, which has to fit.

    Returns:
        ``(tokens of a process at a time, steps until the update)``, the fewest steps possible.

    Raises:
        OptionError: the longest sentence does not fit, or there are no tokens.
    """
    if tokens < 1:
        raise OptionError(f"--batch-tokens {tokens}: expected a number from 1")
    share = tokens // processes
    steps = max(1, -(-share // max(1, most)))
    if min(share // steps, most) < longest:
        remedy = f"raise --max-tokens {most}"
        if share < longest:
            fitting = tokens // longest
            fewer = f"use at most {fitting} processes or " if fitting else ""
            remedy = f"{fewer}give --batch-tokens {longest * processes}"
        raise OptionError(
            f"--batch-tokens {tokens}: {processes} process(es) would take {share // steps} "
            f"tokens at a time, too few for a sentence of {longest} "
            f"(--max-source-positions, --max-target-positions); {remedy}"
        )
    return share // steps, steps


def training_command(benchmark, row, scale, data, run, seed, max_tokens, update_freq, more):
    """The words of the command.

    Args:
        benchmark, row, scale: as for :func:`model_options`.
        data: folder of the binarised text.
        run: folder for checkpoints and log.
        seed: of fairseq.
        max_tokens: of a process at a time.
        update_freq: steps until an update.
        more: options that are added to, or override, those of the benchmark.
    """
    training = {option: value for option, (value, _source) in benchmark.training.items()}
    del training["--arch"], training["--moe-freq"]  # are among the model's options
    training |= SCALES[scale].options
    return [
        *("fairseq-train", str(data), "--user-dir", str(PLUGIN_FOLDER)),
        *("--task", "smoe_translation", "--lang-pairs", ",".join(benchmark.directions())),
        *("--sampling-temperature", f"{benchmark.temperature:g}"),
        *model_options(benchmark, row, scale),
        *("--criterion", "moe_label_smoothed_cross_entropy"),
        *(word for pair in training.items() for word in pair),
        *("--max-tokens", str(max_tokens), "--update-freq", str(update_freq)),
        *("--seed", str(seed)),
        *("--save-dir", str(run / "checkpoints"), "--log-file", str(run / "train.log")),
        *("--eval-bleu", "--keep-interval-updates", "1", "--no-epoch-checkpoints"),
        # a longer validation sentence than the model takes would end the training
        "--skip-invalid-size-inputs-valid-test",
        *("--log-format", "json", "--log-interval", "25"),
        *more,
    ]
