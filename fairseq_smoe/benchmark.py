"""The paper's benchmarks: languages, splits, vocabulary and temperature (``benchmarks/*.json``)."""

import csv
import json
from dataclasses import dataclass
from importlib import resources

NAMES = ("m4", "m15", "opus100")


@dataclass(frozen=True)
class Language:
    """A language other than English."""

    code: str
    resource: str  # the paper's group: high, medium, low, verylow
    name: str = ""
    flores200: str = ""  # its code in Flores-200
    train_only: bool = False  # there is no text to validate or test on


@dataclass(frozen=True)
class Benchmark:
    """Every language of the list is translated from and to English."""

    title: str
    source: str
    english: str
    splits: dict  # split of fairseq -> prefix of its text files
    vocab_size: int
    temperature: float
    languages: tuple

    def pairs(self, train_only=False):
        """``["eng-nso", ...]``; ``train_only`` adds the languages without test text."""
        return [
            f"{self.english}-{language.code}"
            for language in self.languages
            if train_only or not language.train_only
        ]

    def flores_codes(self):
        """``{"eng": "eng_Latn", "nso": "nso_Latn", ...}``, empty where Flores is not used."""
        codes = {language.code: language.flores200 for language in self.languages}
        return {self.english: "eng_Latn", **codes} if all(codes.values()) else {}


def load(name):
    """The :class:`Benchmark` of one of ``NAMES``."""
    folder = resources.files("fairseq_smoe") / "benchmarks"
    fields = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    languages = fields.pop("languages")
    if isinstance(languages, str):
        languages = _from_table((folder / languages).read_text(encoding="utf-8"))
    return Benchmark(languages=tuple(Language(**entry) for entry in languages), **fields)


def _from_table(text):
    for row in csv.DictReader(text.splitlines(), delimiter="\t"):
        yield {
            "code": row["lang"],
            "resource": row["resource"],
            "train_only": row["test"] == "0",
        }
