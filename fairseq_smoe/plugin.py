"""Importing this module registers the plugin with fairseq."""

import sys

from fairseq_smoe.generation import hooks as generation_hooks
from fairseq_smoe.training import compat, hooks
from fairseq_smoe.translation.own_modules import import_named_modules

compat.apply()
# before the model, whose options include those of user-defined gates and experts
import_named_modules(sys.argv[1:])
hooks.apply()
generation_hooks.apply()

from fairseq_smoe.generation import hub  # noqa: E402
from fairseq_smoe.training import fused_adam  # noqa: E402,F401
from fairseq_smoe.translation import criterion, model, task  # noqa: E402,F401

hub.use_for_our_task()
