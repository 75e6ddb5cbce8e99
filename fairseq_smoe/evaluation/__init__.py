"""Translating test sets in many directions with a model that is loaded once."""

import logging
import warnings


def set_up_fairseq():
    """Import fairseq without its messages for developers, and register the plugin."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    # one of fairseq's modules makes every package print what it has for debugging
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import fairseq  # noqa: F401

        import fairseq_smoe

        fairseq_smoe.register()
