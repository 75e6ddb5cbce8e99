"""Importing this module registers the plugin with fairseq."""

import sys

from fairseq_smoe.training import compat, hooks
from fairseq_smoe.translation.own_modules import import_named_modules

compat.apply()
hooks.apply()
# before the options of the model are put together, as fairseq adds those to its parser next
import_named_modules(sys.argv[1:])

from fairseq_smoe.translation import criterion, model, task  # noqa: E402,F401
