"""Models with random parameters, LayerNorms too, which are 1 and 0 at first."""

import torch
import toy_task

from fairseq_smoe.export.language_start import LanguageStart
from fairseq_smoe.inference.packed import joint_dictionary


def build(data, *words):
    """``(model, options, dictionary, start)`` of an untrained model.

    Args:
        data: output of prepare.
        words: of fairseq-train.
    """
    cfg, task, model, _ = toy_task.set_up(data, *words)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 if parameter.dim() == 1 else 0.1)
    dictionary = joint_dictionary(task, "none")
    return model.eval(), cfg.model, dictionary, LanguageStart.of(task, dictionary)


def batch(dictionary):
    """``(sources, lengths, beginnings of targets)`` of random sentences of uneven length, with
    padding behind the sources."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([9, 3, 6, 9, 1])
    sources = torch.randint(4, len(dictionary), (5, 9), generator=generator)
    sources[torch.arange(9) >= lengths[:, None]] = dictionary.pad()
    targets = torch.randint(4, len(dictionary), (5, 7), generator=generator)
    targets[:, 0] = dictionary.eos()
    return sources, lengths, targets
