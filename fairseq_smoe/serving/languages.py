"""Names of languages, and the codes that clients give."""

from babel import Locale, UnknownLocaleError
from babel.core import get_global


class Languages:
    """The languages of a model, under its own codes and their ISO 639 equivalents: a model that
    knows ``eng`` also understands ``en``.

    Args:
        codes: of the model.
        directions: ``(source, target)`` of the training.
    """

    def __init__(self, codes, directions):
        self.directions = list(directions)
        self._codes = {}
        for code in codes:
            for name in (_canonical(code), code):  # the model's own code comes last, and stays
                self._codes.setdefault(name.lower(), code)
            self._codes[code.lower()] = code
        self.codes = list(codes)

    def find(self, name):
        """The model's code of a language; None if it does not know it."""
        name = name.lower()
        return self._codes.get(name) or self._codes.get(_canonical(name).lower())

    def listed(self):
        """As LibreTranslate lists them: ``[{"code", "name", "targets"}]``, of languages from which
        the model translates."""
        targets = {}
        for source, target in self.directions:
            targets.setdefault(source, []).append(target)
        return [
            {"code": code, "name": name_of(code), "targets": targets[code]}
            for code in self.codes
            if code in targets
        ]


def name_of(code):
    """The English name of a language, or its code."""
    try:
        return Locale.parse(_canonical(code)).get_language_name("en") or code
    except (UnknownLocaleError, ValueError):
        return code


def _canonical(code):
    """``eng`` -> ``en``, ``zsm_Latn`` -> ``ms``; other codes stay."""
    language = code.replace("-", "_").split("_")[0].lower()
    return get_global("language_aliases").get(language, language)
