"""The tokens of languages that a model expects in front of source and target."""

from dataclasses import dataclass

from fairseq.data.multilingual.multilingual_utils import get_lang_tok

from fairseq_smoe.errors import OptionError


@dataclass(frozen=True)
class LanguageStart:
    """How sentences begin.

    Attributes:
        tokens: ``{language: token}`` of all languages.
        source: whose token stands in front of a source: "src" for the language of the source, "tgt"
            for that of the target, None for no token.
        target: whether every target begins with the token of its language.
    """

    tokens: dict
    source: str | None
    target: bool

    @classmethod
    def of(cls, task, dictionary):
        """That of a task of all directions.

        Raises:
            OptionError: other runtimes cannot begin a sentence like that.
        """
        options = task.args
        if options.lang_tok_replacing_bos_eos:
            raise OptionError(
                "--lang-tok-replacing-bos-eos: a model that was trained with it cannot be "
                "exported; use 'translate' and 'serve'"
            )
        source, target = options.langtoks["main"]
        whose = None if source is None else "src" if source.startswith("src") else "tgt"
        spec = target or source or "tgt"
        tokens = {lang: get_lang_tok(lang, options.lang_tok_style, spec) for lang in task.langs}
        missing = [token for token in tokens.values() if token not in dictionary]
        if missing and (whose or target):
            raise OptionError(
                f"--langtoks {options.langtoks['main']}: the dictionary has no {missing[0]}, which "
                "an exported model needs; use 'translate' and 'serve'"
            )
        return cls(tokens, whose, target is not None)
