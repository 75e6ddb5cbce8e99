"""SentencePiece and the dictionary of a translation model, with the tokens of languages."""

import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from transformers import LogitsProcessor, PreTrainedTokenizer


class TranslationRules(LogitsProcessor):
    """Which tokens may come next, as in fairseq's search: the token of the language first, then
    words, and the end at the maximal length.

    Tokens keep their log probability. ``forced_bos_token_id`` and ``forced_eos_token_id`` set it to
    0, which ranks translations of different lengths a little otherwise.

    Args:
        first: id of the language's token; None for no such token.
        eos: id of the end of the sentence.
        no_words: ids that no translation has: padding, and all languages.
        max_words: most tokens of a translation.
    """

    def __init__(self, first, eos, no_words, max_words):
        self.first, self.eos = first, eos
        self.no_words, self.max_words = list(no_words), max_words

    def __call__(self, input_ids, scores):
        words = input_ids.shape[1] - 1  # without the token that the decoder starts with
        if self.first is not None:
            words -= 1
        if words < 0:
            return self._only(self.first, scores)
        if words == self.max_words:
            return self._only(self.eos, scores)
        return scores.index_fill(
            1, torch.tensor(self.no_words, device=scores.device), -float("inf")
        )

    @staticmethod
    def _only(token, scores):
        masked = scores.new_full(scores.shape, -float("inf"))
        masked[:, token] = scores[:, token]
        return masked


class SMoETokenizer(PreTrainedTokenizer):
    """Encodes a text into the ids that the model was trained with.

    The text is given to SentencePiece as it is: a special token that is written out in a text is
    text.

    Args:
        vocab_file: JSON, ``{piece: id}``.
        spm_file: SentencePiece model.
        language_tokens: ``{language: token}``
        source_token: whose token stands in front of a source: "src" for the language of the source,
            "tgt" for that of the target, None for no token.
        target_token: whether every target begins with the token of its language.
        src_lang, tgt_lang: languages of the next texts; may be changed at any time.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "spm_file": "spm.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file,
        spm_file,
        language_tokens=None,
        source_token="tgt",
        target_token=True,
        src_lang=None,
        tgt_lang=None,
        **kwargs,
    ):
        self._ids = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self._pieces = {i: piece for piece, i in self._ids.items()}
        self._spm_file = spm_file
        self._spm = sentencepiece.SentencePieceProcessor(model_file=str(spm_file))
        self.language_tokens = dict(language_tokens or {})
        self.source_token, self.target_token = source_token, target_token
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        self._encodes_targets = False
        defaults = {
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": list(self.language_tokens.values()),
        }
        super().__init__(
            **{**defaults, **kwargs},
            language_tokens=self.language_tokens,
            source_token=source_token,
            target_token=target_token,
            src_lang=src_lang,
            tgt_lang=tgt_lang,
        )

    @property
    def vocab_size(self):
        return len(self._ids)

    def get_vocab(self):
        return dict(self._ids)

    def tokenize(self, text, **kwargs):
        """The pieces of a text."""
        return [self._spm.id_to_piece(i) for i in self._spm.encode(text)]

    def _tokenize(self, text, **kwargs):
        return self.tokenize(text)

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index):
        return self._pieces.get(index, "<unk>")

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        """As that of any tokenizer, except that unknown pieces remain visible."""
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        hidden = set(self.all_special_ids) - {self.unk_token_id} if skip_special_tokens else ()
        return [self._convert_id_to_token(int(i)) for i in ids if int(i) not in hidden]

    def convert_tokens_to_string(self, tokens):
        return " ".join(tokens).replace(" ", "").replace("▁", " ").strip()

    def language_id(self, language):
        """The id of a language's token, as ``forced_bos_token_id`` for the target's.

        Raises:
            ValueError: the model does not know the language.
        """
        if language not in self.language_tokens:
            known = ", ".join(self.language_tokens)
            raise ValueError(f"language {language!r}: expected one of {known}")
        return self._ids[self.language_tokens[language]]

    def rules(self, max_words=200):
        """:class:`TranslationRules` of translations into ``tgt_lang``, for ``logits_processor`` of
        ``generate``.

        Args:
            max_words: most tokens of a translation, without the language's and the end of the
                sentence. ``max_new_tokens`` has to leave room for all of them.
        """
        first = self.language_id(self.tgt_lang) if self.target_token else None
        languages = [self._ids[token] for token in self.language_tokens.values()]
        no_words = [self.pad_token_id, *languages]
        return TranslationRules(first, self.eos_token_id, no_words, max_words)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        if token_ids_1 is not None:
            raise ValueError("expected one text, not a pair")
        return [*self._first(), *token_ids_0, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ):
        if already_has_special_tokens:
            return [int(i in self.all_special_ids) for i in token_ids_0]
        return [*(1 for _ in self._first()), *(0 for _ in token_ids_0), 1]

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def _first(self):
        """Ids in front of a text."""
        whose = self.source_token
        if self._encodes_targets:
            whose = "tgt" if self.target_token else None
        if whose is None:
            return []
        name = f"{whose}_lang"
        language = getattr(self, name)
        if language is None:
            raise ValueError(f"{name} is not set: give it to from_pretrained, or set it")
        return [self.language_id(language)]

    def _switch_to_input_mode(self):
        self._encodes_targets = False

    def _switch_to_target_mode(self):
        self._encodes_targets = True

    def _build_translation_inputs(self, raw_inputs, *args, src_lang, tgt_lang, **kwargs):
        """For the pipeline "translation"."""
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        inputs = self(raw_inputs, *args, **kwargs)
        if self.target_token:
            inputs["forced_bos_token_id"] = self.language_id(tgt_lang)
        return inputs

    def save_vocabulary(self, save_directory, filename_prefix=None):
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab, spm = (
            Path(save_directory) / (prefix + self.vocab_files_names[name])
            for name in ("vocab_file", "spm_file")
        )
        vocab.write_text(json.dumps(self._ids, ensure_ascii=False, indent=0), encoding="utf-8")
        if not (spm.exists() and spm.samefile(self._spm_file)):
            shutil.copyfile(self._spm_file, spm)
        return str(vocab), str(spm)

    def __getstate__(self):
        return {**self.__dict__, "_spm": None}

    def __setstate__(self, state):
        self.__dict__ = state
        self._spm = sentencepiece.SentencePieceProcessor(model_file=str(self._spm_file))
