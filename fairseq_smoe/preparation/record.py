"""Which steps are complete, and the options that they were run with (``steps.json``)."""

import json

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation.files import write_whole
from fairseq_smoe.preparation.options import STEP_OPTIONS, STEPS, flag


class Record:
    """Keeps the output of different calls apart: a step's options cannot change unnoticed."""

    def __init__(self, target):
        self.target = target
        self.path = target / "steps.json"
        self.steps = {}
        if self.path.exists():
            self.steps = json.loads(self.path.read_text(encoding="utf-8"))

    def is_complete(self, step):
        return self.steps.get(step, {}).get("complete", False)

    def forget(self, first):
        """Forget a step and all that follow."""
        for step in STEPS[STEPS.index(first) :]:
            self.steps.pop(step, None)
        self._write()

    def begin(self, step, options):
        """Check that ``step`` may run, and note its options (a dict of all of them).

        Raises:
            OptionError: an earlier step is not complete, or this or an earlier one was begun with
                other options.
        """
        for earlier in STEPS[: STEPS.index(step)]:
            if not self.is_complete(earlier):
                raise OptionError(
                    f"--steps {step}: {earlier} is not complete in {self.target}; run it first"
                )
        for known in STEPS[: STEPS.index(step) + 1]:
            # as json gives it back, which has no tuples
            mine = {name: json.loads(json.dumps(options[name])) for name in STEP_OPTIONS[known]}
            self._check_same(known, mine)
        self.steps.setdefault(step, {"complete": False, "options": mine})
        self._write()

    def complete(self, step, **facts):
        self.steps[step] |= {"complete": True, **facts}
        self._write()

    def _check_same(self, step, options):
        for name, before in self.steps.get(step, {}).get("options", {}).items():
            if options[name] != before:
                raise OptionError(
                    f"{flag(name)} {_words(options[name])}: {self.target} was begun with "
                    f"{flag(name)} {_words(before)}; choose another --to, or give --redo {step} to "
                    "replace what is there"
                )

    def _write(self):
        write_whole(self.path, json.dumps(self.steps, indent=1) + "\n")


def _words(value):
    if isinstance(value, dict):
        return " ".join(f"{name}={prefix}" for name, prefix in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
