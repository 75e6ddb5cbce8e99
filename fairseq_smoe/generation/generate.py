"""fairseq-generate: every sentence is translated, with or without a reference."""

from functools import partial, wraps

import numpy as np

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.batches import fit_batches
from fairseq_smoe.generation.program import changing_task, is_ours, structured, use_utf8
from fairseq_smoe.generation.shown import show_words_alone
from fairseq_smoe.generation.warn import warn
from fairseq_smoe.patching import replaced
from fairseq_smoe.translation.shortened import describe_long, first_few


def change_generate(module):
    """Change ``fairseq_cli.generate`` for this project's task."""
    stock = module.main

    @wraps(stock)
    def main(cfg):
        if not is_ours(cfg):
            return stock(cfg)
        cfg = structured(cfg)
        use_utf8()

        def change(task):
            task.data_manager.needs_target = False
            show_words_alone(task)
            skip = cfg.dataset.skip_invalid_size_inputs_valid_test
            scoring = cfg.generation.score_reference
            fit_batches(task, partial(check, cfg, task), skip, scoring)

        changed = {"tasks": changing_task(module, change)}
        if cfg.generation.score_reference:
            changed["print"] = print_no_score
        with replaced(module, **changed):
            return stock(cfg)

    module.main = main


def print_no_score(text, **options):
    """``print``, but for the BLEU of references in comparison with themselves."""
    if not text.startswith("Generate "):
        print(text, **options)


def check(cfg, task, dataset, limits):
    """Warn of sentences that are cut or left out.

    Args:
        dataset: :class:`~fairseq_smoe.translation.shortened.ShortenedDataset` of the test set.
        limits: tokens of a source and of a target at most.

    Raises:
        OptionError: an option needs the target side, and the data has none.
    """
    generation = cfg.generation
    name = f"{cfg.dataset.gen_subset} {task.lang_pairs[0]}"
    if not dataset.has_target:
        for option, given in (
            ("--prefix-size", generation.prefix_size),
            ("--score-reference", generation.score_reference),
        ):
            if given:
                raise OptionError(
                    f"{option}: {name} in {cfg.task.data} has no target side; leave the option out "
                    "to translate"
                )
    consequences = ["the end is not translated", "the end is not scored"]
    sides = [dataset.shortened(), dataset.shortened(side=1)]
    if cfg.dataset.skip_invalid_size_inputs_valid_test:
        consequences = ["left out (--skip-invalid-size-inputs-valid-test)"] * 2
        sides[1] = np.flatnonzero(dataset.original_sizes[:, 1] > limits[1])
    for side, cut, limit, consequence in zip(("source", "target"), sides, limits, consequences):
        if len(cut):
            which = first_few([f"S-{i}" for i in cut])
            warn(describe_long(f"{name}, {side} of {which}", limit, consequence, side))
