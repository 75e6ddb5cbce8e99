"""Importing this module registers the plugin with fairseq."""

from fairseq_smoe import compat

compat.apply()

from fairseq_smoe import criterion, model, task  # noqa: E402,F401
