"""Importing this module registers the plugin with fairseq."""

import sys

from fairseq_smoe.training import compat, hooks
from fairseq_smoe.translation.own_modules import import_named_modules

compat.apply()
hooks.apply()
# before the model's options are collected, which fairseq adds to its parser next
import_named_modules(sys.argv[1:])

from fairseq_smoe.translation import criterion, model, task  # noqa: E402,F401
