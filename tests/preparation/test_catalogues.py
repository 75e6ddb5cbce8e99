"""Catalogues to parallel text, on real .po files."""

from argparse import Namespace

import polib
import pytest

from fairseq_smoe.commands import catalogues as command
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import catalogues


def write_catalogue(folder, package, lang, entries):
    """A .po file; an entry is (English, translation) or a ``polib.POEntry``."""
    path = folder / package / "locale" / lang / "LC_MESSAGES" / "django.po"
    path.parent.mkdir(parents=True)
    catalogue = polib.POFile()
    for entry in entries:
        if not isinstance(entry, polib.POEntry):
            entry = polib.POEntry(msgid=entry[0], msgstr=entry[1])
        catalogue.append(entry)
    catalogue.save(str(path))
    return path


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_keeps_only_translated_plain_short_entries(tmp_path):
    path = write_catalogue(
        tmp_path,
        "shop",
        "de",
        [
            ("Delete  the\npage", "Seite löschen"),
            ("untranslated", ""),
            ("copied", "copied"),
            ("%(count)s pages", "%(count)s Seiten"),
            ("<b>bold</b>", "<b>fett</b>"),
            ("{name} is here", "{name} ist da"),
            ("...", "…"),
            ("very " * catalogues.MAX_WORDS + "long", "sehr lang"),
            polib.POEntry(msgid="guess", msgstr="Rat", flags=["fuzzy"]),
            polib.POEntry(msgid="old", msgstr="alt", obsolete=True),
            polib.POEntry(msgid="a", msgid_plural="b", msgstr_plural={0: "c", 1: "d"}),
        ],
    )
    assert catalogues.read_pairs([path]) == {"Delete the page": "Seite löschen"}


def test_first_spelling_wins(tmp_path):
    path = write_catalogue(
        tmp_path, "shop", "de", [("Password:", "Passwort:"), ("password", "Kennwort")]
    )
    assert catalogues.read_pairs([path]) == {"Password:": "Passwort:"}


def test_a_text_is_in_the_same_split_for_every_language():
    texts = [f"Delete page number {i} now" for i in range(2000)]
    splits = catalogues.split_pairs({text: text.upper() for text in texts})
    shares = {name: len(pairs) / len(texts) for name, pairs in splits.items()}
    assert shares["test"] == pytest.approx(catalogues.TEST_SHARE, abs=0.02)
    assert shares["valid"] == pytest.approx(catalogues.VALID_SHARE, abs=0.02)
    assert sum(shares.values()) == 1
    for text in texts:
        assert catalogues.split_of(f"{text.upper()}!") == catalogues.split_of(text)


def test_split_is_the_same_on_every_machine():
    texts = [f"Delete page number {i} now" for i in range(100)]
    held_out = [i for i, text in enumerate(texts) if catalogues.split_of(text) == "test"]
    assert held_out == [1, 22, 35, 36, 39, 44, 54, 58, 63, 66, 85]


def test_labels_are_for_training():
    assert {catalogues.split_of(f"page {i}") for i in range(500)} == {"train"}


def test_writes_parallel_files_without_overlap(tmp_path):
    for lang in ("de", "ru"):
        write_catalogue(
            tmp_path / "packages",
            "shop",
            lang,
            [(f"Delete page number {i} now", f"{lang} {i}") for i in range(500)],
        )
    args = Namespace(
        source=str(tmp_path / "packages"),
        to=str(tmp_path / "text"),
        langs="de,ru",
        test_share=0.2,
    )
    command.run(args)
    english = {}
    for name in ("train", "valid", "test"):
        for lang in ("de", "ru"):
            lines = read_lines(tmp_path / "text" / f"{name}.en-{lang}.en")
            translations = read_lines(tmp_path / "text" / f"{name}.en-{lang}.{lang}")
            assert len(lines) == len(translations) > 0
            english.setdefault(name, set()).update(lines)
    assert sum(map(len, english.values())) == len(set().union(*english.values())) == 500
    assert len(english["test"]) == pytest.approx(0.2 * 500, abs=30)


def test_wrong_share_is_named(tmp_path):
    args = Namespace(source=str(tmp_path), to=str(tmp_path), langs="de", test_share=1.5)
    with pytest.raises(OptionError, match="--test-share 1.5: expected a fraction"):
        command.run(args)


def test_unknown_language_is_named(tmp_path):
    write_catalogue(tmp_path, "shop", "de", [("page", "Seite")])
    with pytest.raises(OptionError, match="--langs xx.*found de"):
        catalogues.find_catalogues(tmp_path, ["xx"])
