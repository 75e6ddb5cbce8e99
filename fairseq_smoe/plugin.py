"""Importing this module registers the plugin with fairseq."""

from fairseq_smoe import compat, hooks

compat.apply()
hooks.apply()

from fairseq_smoe import criterion, model, task  # noqa: E402,F401
