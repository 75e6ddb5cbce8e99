"""The paper's benchmarks: data, training, and the rows and columns of its Tables 1-3.

``benchmarks/m4.json``, ``m15.json`` and ``opus100.json`` have all of this, and the source of each
training option. ``family.json`` has the systems of docs/systems.md as rows, on the data of M4.
"""

import csv
import json
import re
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from importlib import resources
from pathlib import Path

from fairseq_smoe.benchmarks.check import check_benchmark
from fairseq_smoe.errors import OptionError

PAPERS = ("m4", "m15", "opus100")  # with published text and printed figures
NAMES = (*PAPERS, "family")

_FOLDER = resources.files("fairseq_smoe") / "benchmarks"


@dataclass(frozen=True)
class Language:
    """A language other than English."""

    code: str
    resource: str  # the paper's group: high, medium, low, verylow
    name: str = ""
    flores200: str = ""  # its code in Flores-200
    train_only: bool = False  # there is no text to validate or test on


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: as in the paper.
        options: those of fairseq-train that choose the model.
        scores: ``{column: printed score}``; {} where the paper has none.
        params: printed number of parameters, truncated by the paper to the digits shown; "" in
            Table 3, which has none.
        mflops: printed forward FLOPs per token in millions, or None.
    """

    name: str
    options: str
    scores: dict
    params: str = ""
    mflops: int | None = None

    @property
    def slug(self):
        """The name for file names and command lines: ``"vanilla-moe"``."""
        return _slug(self.name)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. Every language of the list is translated from and to English.

    Attributes:
        splits: split of fairseq -> prefix of its text files.
        metric: the metric of the paper's table; see ``fairseq_smoe.evaluation.scoring``.
        size: layers of each side, model dim, hidden size of the FFNs, attention heads.
        batch_tokens: target tokens per update.
        training: ``{option of fairseq-train: (value, where it comes from)}``
        rows: of the paper's table, in its order.
        scored_columns: names of the table's columns of scores, in its order.
        table: which of the paper's it is; "" for one of the user's own.
        clean: what is dropped from its training text; see
            :func:`~fairseq_smoe.benchmarks.cleaning.rules_of`.
    """

    name: str
    title: str
    source: str
    english: str
    splits: dict
    vocab_size: int
    temperature: float
    metric: str
    size: dict
    batch_tokens: int
    training: dict
    rows: tuple
    scored_columns: tuple
    languages: tuple
    table: str = ""
    clean: str | dict = "default"

    def pairs(self, train_only=False):
        """``["eng-nso", ...]``; ``train_only`` adds the languages without test text."""
        return [
            f"{self.english}-{language.code}"
            for language in self.languages
            if train_only or not language.train_only
        ]

    def directions(self, train_only=False):
        """All directions, in the order of the paper's table: one side of English, then the
        other."""
        pairs = self.pairs(train_only)
        reverse = ["-".join(reversed(pair.split("-"))) for pair in pairs]
        out_of_english_first = self.scored_columns[0].startswith(("eng-", f"{self.english}-"))
        return pairs + reverse if out_of_english_first else reverse + pairs

    def columns(self):
        """``{column of the table: the directions whose mean it holds}``

        A column is a direction, a group such as ``eng-xxx_low``, or ``avg``.
        """
        return {column: self._directions_of(column) for column in self.scored_columns}

    def _directions_of(self, column):
        sides, _, group = column.partition("_")
        source, _, target = sides.partition("-")
        if column == "avg":
            return self.directions()
        if "xxx" not in (source, target):
            return [column]
        sides = re.sub(r"\beng\b", self.english, sides)  # the columns always say eng
        return [
            sides.replace("xxx", language.code)
            for language in self.languages
            if not language.train_only and group in ("all", language.resource)
        ]

    def flores_codes(self):
        """``{"eng": "eng_Latn", "nso": "nso_Latn", ...}``, empty where Flores is not used."""
        codes = {language.code: language.flores200 for language in self.languages}
        return {self.english: "eng_Latn", **codes} if all(codes.values()) else {}

    def row(self, name):
        """The :class:`Row` with this name; ``"vanilla-moe"`` finds "Vanilla MoE".

        Raises:
            OptionError: the table has no such row.
        """
        for row in self.rows:
            if row.slug == _slug(name):
                return row
        raise OptionError(
            f"{name}: {self.title} has no such row; choose one of "
            + ", ".join(row.slug for row in self.rows)
        )


def load(name):
    """The :class:`Benchmark` of one of ``NAMES``, or of a JSON file of the user's own.

    The file is like those in ``benchmarks/``. With ``"like": "m4"`` it may leave out entries, also
    single options in ``training`` and ``size``. These are taken from M4, without the paper's
    figures and without ``clean``, which is about the paper's text.

    Raises:
        OptionError: no such benchmark, or the file cannot be used.
    """
    if name in NAMES:
        return _build(name, _completed(_published(name)))
    path = Path(name)
    if path.suffix != ".json":
        raise OptionError(
            f"{name}: no such benchmark; choose one of {', '.join(NAMES)}, or give a .json file "
            "of your own"
        )
    if path.stem in NAMES:
        raise OptionError(f"{name}: {path.stem} exists already; give the file another name")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{name}: {error.strerror}; give a .json file") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{name}: is no UTF-8 text ({error.reason}); save it as such") from error
    try:
        own = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{name}: is no JSON: {error}") from error
    try:
        benchmark = _build(path.stem, _completed(own))
        check_benchmark(benchmark)
        return benchmark
    except KeyError as error:
        raise OptionError(
            f"{name}: {error} is missing or unknown; see docs/reproduce.md"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise OptionError(f"{name}: {error}; see docs/reproduce.md") from error


def reference(name):
    """A name for :func:`load` that works in any folder: the benchmark's, or its file's full
    path."""
    return name if name in NAMES else str(Path(name).absolute())


def _published(name):
    text = (_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)


def _completed(own):
    """The entries of a user's file, completed by those of the benchmark that it is ``like``."""
    if not isinstance(own, dict):
        raise ValueError("expected an object, {...}")
    if "like" not in own:
        return own
    if own["like"] not in PAPERS:
        raise ValueError(f"like {own['like']}: choose one of {', '.join(PAPERS)}")
    other = _without_the_papers(_published(own.pop("like")))
    merged = {key: {**other[key], **own.get(key, {})} for key in ("training", "size")}
    return {**other, **own, **merged}


def _without_the_papers(fields):
    rows = [{"name": row["name"], "options": row["options"]} for row in fields["rows"]]
    return {**fields, "rows": rows, "columns": None, "table": "", "clean": "default"}


def _build(name, fields):
    fields = dict(fields)
    known = {field.name for field in dataclass_fields(Benchmark)} - {"name", "scored_columns"}
    if unknown := fields.keys() - known - {"columns"}:
        raise ValueError(f"{sorted(unknown)[0]}: no such entry")
    languages = fields.pop("languages")
    if languages == "opus100.tsv":
        languages = _from_table((_FOLDER / languages).read_text(encoding="utf-8"))
    languages = tuple(Language(**entry) for entry in languages)
    english = fields["english"]
    columns = fields.pop("columns", None) or [
        *(f"{english}-{language.code}" for language in languages if not language.train_only),
        *(f"{language.code}-{english}" for language in languages if not language.train_only),
        "avg",
    ]
    rows = tuple(
        Row(scores=dict(zip(columns, entry.pop("scores", ()))), **entry)
        for entry in fields.pop("rows")
    )
    return Benchmark(
        name=name, languages=languages, rows=rows, scored_columns=tuple(columns), **fields
    )


def _from_table(text):
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        yield {
            "code": row["lang"],
            "resource": row["resource"],
            "train_only": row["test"] == "0",
        }


def _slug(name):
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-")
