"""The cases of cases.toml, and the page that is made of them:

python tests/options/fairseq_options.py > docs/fairseq-options.md
"""

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

CASES = Path(__file__).with_name("cases.toml")
PROGRAMS = ("generate", "interactive", "training")


@dataclass(frozen=True)
class Case:
    """See cases.toml."""

    option: str
    run: str = None
    refused: str = None
    repaired: str = None
    note: str = None
    effect: str = "same"
    finds: str = None
    late: bool = False
    alone: bool = False

    def words(self, **folders):
        """The words of the command line."""
        if self.run is None:
            needs_value = self.option in ("--path", "--source-lang", "--target-lang")
            return [] if needs_value else [self.option]  # they are in every command
        text = self.run
        for name, folder in folders.items():
            text = text.replace("{%s}" % name, str(folder))
        return shlex.split(text)

    def __str__(self):
        return self.run or self.option


def read():
    with open(CASES, "rb") as handle:
        return tomllib.load(handle)


def cases_of(program):
    """The cases of ``generate``, ``interactive`` or ``training``."""
    content = read()
    if program == "training":
        return [Case(**case) for case in content["training"]["cases"]]
    translating = [Case(**case) for case in content["translating"]["cases"]]
    own = [Case(**case) for case in content["interactive"]["cases"]]
    replaced = {case.option for case in own}
    if program == "interactive":
        return [case for case in translating if case.option not in replaced] + own
    return translating


def outside(program):
    """``(groups, options)`` of the program's --help that have no case: ``{name: reason}``."""
    content = read()["outside"]
    of_kind = content["training" if program == "training" else "translating"]
    groups = content["groups"] | of_kind.pop("groups", {})
    names = content["names"] | of_kind
    return groups, {name: reason for many, reason in names.items() for name in many.split()}


# --------------------------------------------------------------------------------------
# the page

HEAD = """\
# Which of fairseq's options work

Most options of fairseq-train, fairseq-generate and fairseq-interactive work with `--task
smoe_translation` as with fairseq's own tasks. Some do not work in fairseq's multilingual tasks, and
are repaired here. Others are refused: the command ends at once, with a line that names the option,
its value, and what to do.

The tables are made of the cases of a test that runs every option, in
[`tests/options/cases.toml`](../tests/options/cases.toml). The first command runs all of them, the
second writes this page:

    pytest tests/options -m slow
    python tests/options/fairseq_options.py > docs/fairseq-options.md

"Refused" with a condition means that other values work.

"""
MORE = """
Not in the tables:

"""


def page():
    """docs/fairseq-options.md"""
    parts = [HEAD, "## fairseq-generate and fairseq-interactive\n\n"]
    parts += [_table("translating", "cases"), "\nDifferent in fairseq-interactive:\n\n"]
    parts += [_table("interactive", "cases"), MORE, _outside("generate")]
    parts += ["\n## fairseq-train: options about the model, the data and the criterion\n\n"]
    parts += [_table("training", "cases"), MORE, _outside("training")]
    return "".join(parts)


def _table(*path):
    content = read()
    for name in path:
        content = content[name]
    rows = {}
    for case in (Case(**case) for case in content):
        rows.setdefault(case.option, []).append(case)
    lines = ["| option | outcome | note |\n|---|---|---|\n"]
    for option, cases in rows.items():
        cells = [map(_outcome, cases), (case.note for case in cases if case.note)]
        outcome, note = ("; ".join(dict.fromkeys(cell)) for cell in cells)
        lines.append(f"| `{option}` | {outcome} | {note} |\n")
    return "".join(lines)


def _outcome(case):
    if case.refused:
        return f"refused: {case.refused}"
    return f"repaired ({case.repaired})" if case.repaired else "works"


def _outside(program):
    groups, names = outside(program)
    by_reason = {reason: [f'group "{group}"'] for group, reason in groups.items()}
    for name, reason in names.items():
        if name not in ("-h", "--help"):
            by_reason.setdefault(reason, []).append(f"`{name}`")
    return "".join(f"- {reason}: {', '.join(names)}\n" for reason, names in by_reason.items())


if __name__ == "__main__":
    print(page(), end="")
