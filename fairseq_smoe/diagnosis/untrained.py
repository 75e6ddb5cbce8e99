"""Untrained models and made-up sentences: all that a training step needs, without data."""

import contextlib
import io
import tempfile
from pathlib import Path

import torch

from fairseq_smoe.benchmarks.training_command import training_command, vocab_size
from fairseq_smoe.training.compat import use_no_absent_tpu

SHORTEST, LONGEST = 10, 50  # tokens of the made-up sentences


def untrained_model(benchmark, row, scale, tokens, seed, more):
    """What fairseq-train builds for a row's command, with a made-up vocabulary. The plugin has to
    be registered with fairseq already.

    Args:
        benchmark, row, scale: as for ``training_command``.
        tokens: --max-tokens
        more: words that are added to the command, e.g. ``["--cpu"]``.

    Returns:
        ``(cfg, task, model, criterion)``
    """
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        languages = sorted({lang for pair in benchmark.directions() for lang in pair.split("-")})
        words = "".join(f"w{i} 1\n" for i in range(vocab_size(benchmark, scale)))
        for language in languages:
            (folder / f"dict.{language}.txt").write_text(words)
        (folder / "langs.txt").write_text("\n".join(languages))
        command = training_command(benchmark, row, scale, folder, folder, seed, tokens, 1, more)
        namespace = options.parse_args_and_arch(options.get_training_parser(), command[1:])
        cfg = convert_namespace_to_omegaconf(namespace)
        use_no_absent_tpu(cfg)
        with contextlib.redirect_stdout(io.StringIO()):
            task = tasks.setup_task(cfg.task)
            return cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion)


def made_up_sentences(dictionary, tokens, seed):
    """Sentences with at least ``tokens`` tokens in total: list of (S,) int64, longest first."""
    generator = torch.Generator().manual_seed(seed)
    found, total = [], 0
    while total < tokens:
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        words = torch.randint(4, len(dictionary), (length - 1,), generator=generator)
        found.append(torch.cat([words, torch.tensor([dictionary.eos()])]))
        total += length
    return sorted(found, key=len, reverse=True)


def made_up_batch(dictionary, tokens, seed):
    """A batch as fairseq's datasets make it, in which every sentence is its own translation."""
    from fairseq.data.data_utils import collate_tokens

    source = target = made_up_sentences(dictionary, tokens, seed)
    pad, eos = dictionary.pad(), dictionary.eos()
    return {
        "id": torch.arange(len(source)),
        "nsentences": len(source),
        "ntokens": sum(map(len, target)),
        "net_input": {
            "src_tokens": collate_tokens(source, pad, left_pad=True),
            "src_lengths": torch.tensor([len(sentence) for sentence in source]),
            "prev_output_tokens": collate_tokens(target, pad, eos, move_eos_to_beginning=True),
        },
        "target": collate_tokens(target, pad),
    }
