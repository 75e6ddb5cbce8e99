"""fairseq-generate: every sentence is translated, with or without a reference."""

from functools import partial, wraps
from types import SimpleNamespace

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.batches import fit_batches
from fairseq_smoe.generation.program import is_ours, structured, use_utf8
from fairseq_smoe.generation.shown import show_words_alone
from fairseq_smoe.generation.warn import warn
from fairseq_smoe.patching import Overlay, replaced
from fairseq_smoe.translation.shortened import describe_shortened, first_few


def change_generate(module):
    """Change ``fairseq_cli.generate`` for this project's task."""
    stock = module.main

    @wraps(stock)
    def main(cfg):
        cfg = structured(cfg)
        if not is_ours(cfg):
            return stock(cfg)
        use_utf8()
        stock_tasks = module.tasks

        def setup_task(*args, **kwargs):
            task = stock_tasks.setup_task(*args, **kwargs)
            task.data_manager.needs_target = False
            show_words_alone(task)
            fit_batches(
                task,
                partial(check, cfg, task),
                skip=cfg.dataset.skip_invalid_size_inputs_valid_test,
                with_targets=cfg.generation.score_reference,
            )
            return task

        changed = {"tasks": Overlay(stock_tasks, SimpleNamespace(setup_task=setup_task))}
        if cfg.generation.score_reference:
            changed["print"] = print_no_score
        with replaced(module, **changed):
            return stock(cfg)

    module.main = main


def print_no_score(text, **options):
    """``print``, but for the BLEU of references in comparison with themselves."""
    if not text.startswith("Generate "):
        print(text, **options)


def check(cfg, task, dataset, longest):
    """Warn of sentences that are cut.

    Args:
        dataset: :class:`ShortenedDataset` of the test set.
        longest: tokens of a source at most.

    Raises:
        OptionError: an option needs the target side, and the data has none.
    """
    generation, subset = cfg.generation, cfg.dataset.gen_subset
    if not dataset.has_target:
        for option, given in (
            ("--prefix-size", generation.prefix_size),
            ("--score-reference", generation.score_reference),
        ):
            if given:
                raise OptionError(
                    f"{option}: {subset} {task.lang_pairs[0]} in {cfg.task.data} has no target "
                    "side; leave the option out to translate"
                )
    for side, cut in enumerate((dataset.shortened(), dataset.shortened(side=1))):
        if len(cut):
            names = first_few([f"S-{i}" for i in cut])
            where = f"{subset} {task.lang_pairs[0]}, {'target of ' if side else ''}{names}"
            warn(describe_shortened(where, longest))
