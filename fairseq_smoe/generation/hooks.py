"""What fairseq-generate and fairseq-interactive do differently with this project's task.

:func:`apply` is called once, when the plugin is loaded.
"""

import sys

from fairseq_smoe.generation.generate import change_generate
from fairseq_smoe.generation.interactive import change_interactive
from fairseq_smoe.generation.options import change_options
from fairseq_smoe.patching import when_imported

# change_options comes last: what it does to a task is below the changes for printing
CHANGES = {
    "fairseq_cli.generate": (change_generate, change_options),
    "fairseq_cli.interactive": (change_interactive, change_options),
}


def apply():
    program = sys.modules["__main__"]
    run = getattr(getattr(program, "__spec__", None), "name", None)  # by python -m
    for name, changes in CHANGES.items():
        for change in changes:
            when_imported(name, change)
            if run == name:
                change(program)
