"""Importing this module registers the plugin with fairseq."""

import sys

from fairseq_smoe.training import compat, hooks
from fairseq_smoe.translation.own_modules import import_named_modules

compat.apply()
# the options of gates and experts of the user's own are among the model's, which come next
import_named_modules(sys.argv[1:])
hooks.apply()

from fairseq_smoe.translation import criterion, model, task  # noqa: E402,F401
