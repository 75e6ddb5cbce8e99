"""What fairseq-generate and fairseq-interactive do differently with this project's task.

:func:`apply` is called once, when the plugin is loaded.
"""

import sys

from fairseq_smoe.generation.generate import change_generate
from fairseq_smoe.generation.interactive import change_interactive
from fairseq_smoe.patching import when_imported

CHANGES = {
    "fairseq_cli.generate": change_generate,
    "fairseq_cli.interactive": change_interactive,
}


def apply():
    program = sys.modules["__main__"]
    for name, change in CHANGES.items():
        when_imported(name, change)
        if (
            getattr(getattr(program, "__spec__", None), "name", None) == name
        ):  # python -m fairseq_cli.interactive
            change(program)
