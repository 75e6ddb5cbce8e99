"""What a conversion tells of what it has done."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fairseq_smoe.files import write_whole


def parameters_line(number):
    """A line about numbers of parameters, ``{"before": ..., "after": ...}``."""
    before, after = number["before"], number["after"]
    return f"parameters: {before:,} before, {after:,} after ({after / before:.3f} times)"


@dataclass
class Report:
    """What a conversion has done.

    Attributes:
        facts: of plain types; written as JSON beside the new checkpoint.
        lines: what to print.
        pictures: ``{name: function of a path that draws it}``, written beside it as well.
        remove: called when all is written; removes what a conversion has kept on the way.
    """

    facts: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)
    remove: Callable[[], None] = lambda: None

    def write(self, checkpoint):
        """Write the files beside a checkpoint, named after it.

        Returns:
            list of their paths.
        """
        checkpoint = Path(checkpoint)
        path = checkpoint.with_suffix(".report.json")
        write_whole(path, json.dumps(self.facts, indent=1) + "\n")
        paths = [path]
        if self.pictures and importlib.util.find_spec("matplotlib") is None:
            print("no pictures, they need matplotlib: pip install 'fairseq-smoe[plot]'")
            return paths
        for name, draw in self.pictures.items():
            paths.append(checkpoint.with_suffix(f".{name}.png"))
            draw(paths[-1])
        return paths
