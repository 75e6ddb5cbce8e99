"""Turning gettext catalogues of installed or unpacked packages into a small parallel corpus.

Writes ``{train,valid,test}.en-XX.en`` and ``.XX`` for every language XX, one sentence per line.
"""

import hashlib
import re

import polib

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import write_whole

VALID_SHARE, TEST_SHARE = 0.04, 0.07  # of the texts that are not too short for a test
MIN_HELD_OUT_WORDS = 3  # shorter texts, labels such as "Add user", go to the training data
MAX_WORDS = 8

# <b>, &nbsp;, %s, %(name)s, {name}, ``literal``: code, which a translation copies
_MARKUP = re.compile(r"<[a-z/!]|&#?\w+;|%[(a-z]|[{}]|``", re.IGNORECASE)


def make_corpus(source, target, langs, test_share):
    """Write the parallel text of the catalogues below ``source`` into ``target``; print its size.

    Raises:
        OptionError: a language has no catalogue, or ``test_share`` leaves nothing to train on.
    """
    if not 0 <= test_share < 1 - VALID_SHARE:
        raise OptionError(
            f"--test-share {test_share}: expected a fraction from 0 up to {1 - VALID_SHARE}"
        )
    catalogues = find_catalogues(source, langs)
    target.mkdir(parents=True, exist_ok=True)
    for lang, paths in catalogues.items():
        splits = split_pairs(read_pairs(paths), test_share)
        for name, pairs in splits.items():
            write_split(target, name, lang, pairs)
        sizes = ", ".join(f"{len(pairs)} {name}" for name, pairs in splits.items())
        print(f"en-{lang}: {sizes}, from {len(paths)} catalogues")


def find_catalogues(folder, langs):
    """``{language: sorted .po files}``, everywhere below ``folder``.

    Raises:
        OptionError: the folder holds no catalogue of one of the languages.
    """
    found = {}
    for path in sorted(folder.glob("**/LC_MESSAGES/*.po")):
        found.setdefault(path.parent.parent.name, []).append(path)
    for lang in langs:
        if lang not in found:
            raise OptionError(
                f"--langs {lang}: no {lang}/LC_MESSAGES/*.po below {folder}; "
                f"found {','.join(sorted(found)) or 'no language at all'}"
            )
    return {lang: found[lang] for lang in langs}


def read_pairs(paths):
    """``{English text: translation}`` of the usable entries; the first catalogue wins."""
    pairs, seen = {}, set()
    for path in paths:
        for entry in polib.pofile(str(path)):
            key = split_key(entry.msgid)
            if is_sentence_pair(entry) and key not in seen:
                seen.add(key)
                pairs[_one_line(entry.msgid)] = _one_line(entry.msgstr)
    return pairs


def is_sentence_pair(entry):
    """Whether an entry is translated, up to date, plain text and not too long."""
    texts = (entry.msgid, entry.msgstr)
    return (
        entry.translated()  # neither obsolete nor fuzzy nor empty
        and not entry.msgid_plural
        and entry.msgid != entry.msgstr
        and split_key(entry.msgid) != ""
        and not any(_MARKUP.search(text) for text in texts)
        and all(0 < len(text.split()) <= MAX_WORDS for text in texts)
    )


def split_key(text):
    """A key that spellings of one text share: ``"Password:"`` and ``"password"`` have the same."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def split_pairs(pairs, test_share=TEST_SHARE):
    """Assign pairs to train, valid and test by a hash of the English text.

    A text is thus in the same split for every language and on every machine.
    """
    splits = {"train": {}, "valid": {}, "test": {}}
    for english, translation in pairs.items():
        splits[split_of(english, test_share)][english] = translation
    return splits


def split_of(english, test_share=TEST_SHARE):
    if len(english.split()) < MIN_HELD_OUT_WORDS:
        return "train"
    digest = hashlib.sha256(split_key(english).encode("utf-8")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64  # evenly distributed in 0..1
    if place < test_share:
        return "test"
    return "valid" if place < test_share + VALID_SHARE else "train"


def write_split(target, name, lang, pairs):
    for suffix, lines in (("en", pairs.keys()), (lang, pairs.values())):
        text = "".join(f"{line}\n" for line in lines)
        write_whole(target / f"{name}.en-{lang}.{suffix}", text)


def _one_line(text):
    return " ".join(text.split())
