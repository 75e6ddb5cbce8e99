"""The record of complete steps and their options (``steps.json``)."""

import json

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole
from fairseq_smoe.preparation.options import STEP_OPTIONS, STEPS, flag


class Record:
    """Refuses to mix the output of calls with different options."""

    def __init__(self, target):
        self.target = target
        self.path = target / "steps.json"
        self.steps = {}
        if self.path.exists():
            self.steps = json.loads(self.path.read_text(encoding="utf-8"))
        if "clean" in self.steps:  # earlier versions knew no other cleaning
            options = self.steps["clean"]["options"]
            self.steps["clean"]["options"] = {"cleaning": "default", **options}

    def is_complete(self, step):
        return self.steps.get(step, {}).get("complete", False)

    def forget(self, first):
        """Forget a step and all that follow."""
        for step in STEPS[STEPS.index(first) :]:
            self.steps.pop(step, None)
        self._write()

    def require_earlier(self, step, options):
        """Check that all steps before ``step`` are complete, with these options (a dict of all).

        Raises:
            OptionError: one is not complete, or was begun with other options.
        """
        for earlier in STEPS[: STEPS.index(step)]:
            if not self.is_complete(earlier):
                raise OptionError(
                    f"--steps {step}: {earlier} is not complete in {self.target}; run it first"
                )
            self._check_same(earlier, _options_of(earlier, options))

    def begin(self, step, options):
        """Check that ``step`` may run, and note its options.

        Raises:
            OptionError: as :meth:`require_earlier`; or ``step`` was begun with other options.
        """
        self.require_earlier(step, options)
        mine = _options_of(step, options)
        self._check_same(step, mine)
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
                    f"{flag(name)} {_words(before)}; give that again, choose another --to, or give "
                    f"--redo {self._first_possible(step)} to replace what is there"
                )

    def _first_possible(self, step):
        """The first step that can be redone: fetch, if the user has deleted the intermediate
        files."""
        return step if (self.target / "work" / "raw").exists() else "fetch"

    def _write(self):
        write_whole(self.path, json.dumps(self.steps, indent=1) + "\n")


def _options_of(step, options):
    """The options of a step as JSON returns them, which has no tuples."""
    return {name: json.loads(json.dumps(options[name])) for name in STEP_OPTIONS[step]}


def _words(value):
    if isinstance(value, dict):
        return " ".join(f"{name}={prefix}" for name, prefix in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
