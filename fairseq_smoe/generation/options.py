"""Options of fairseq-generate and fairseq-interactive that fairseq reads in the wrong way."""

import ast
from functools import wraps

from fairseq_smoe.errors import OptionError, complaints_in_one_line
from fairseq_smoe.generation.program import is_ours, structured
from fairseq_smoe.generation.replace_unk import replace_unknown_words


def change_options(module):
    """Change ``fairseq_cli.generate`` or ``fairseq_cli.interactive`` for this project's task."""
    stock = module.main

    @wraps(stock)
    def main(cfg):
        cfg = structured(cfg)
        if not is_ours(cfg):
            return stock(cfg)
        check_overrides(cfg.common_eval.model_overrides)
        translate_one_part(cfg)
        with complaints_in_one_line(), replace_unknown_words(module, cfg):
            return stock(cfg)

    module.main = main


def check_overrides(text):
    """
    Raises:
        OptionError: --model-overrides is no dictionary.
    """
    try:
        is_dictionary = isinstance(ast.literal_eval(text), dict)
    except (ValueError, SyntaxError):
        is_dictionary = False
    if not is_dictionary:
        raise OptionError(
            f"--model-overrides {text}: expected a Python dictionary in quotes, such as "
            "\"{'dropout': 0.1}\""
        )


def translate_one_part(cfg):
    """fairseq takes --num-shards from the number of GPUs: with two of them, it would translate
    every other batch only."""
    cfg.distributed_training.distributed_world_size = cfg.dataset.num_shards
    cfg.distributed_training.distributed_rank = cfg.dataset.shard_id
