"""Replacements of what fairseq-generate and fairseq-interactive call for this project's task.

:func:`apply` is called once, when the plugin is loaded.
"""

import sys

from fairseq_smoe.generation import hub
from fairseq_smoe.generation.options import change_options
from fairseq_smoe.patching import when_imported

CHANGES = {
    "fairseq_cli.generate": [change_options],
    "fairseq_cli.interactive": [change_options],
}


def apply():
    hub.use_for_our_task()
    program = sys.modules["__main__"]
    for name, changes in CHANGES.items():
        for change in changes:
            when_imported(name, change)
            if getattr(program.__spec__, "name", None) == name:  # python -m fairseq_cli.generate
                change(program)
