"""A trained model with more tokens in its vocabulary, for languages that it has not seen."""

import sentencepiece
import torch

from fairseq_smoe.checkpoints.data_record import DataRecord
from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation.vocabulary import (
    FAIRSEQ_SPECIALS,
    language_token,
    read_dictionary,
)
from fairseq_smoe.translation.languages import read_languages
from fairseq_smoe.translation.task_files import LANGS_FILE, SPM_FILE

EMBEDDINGS = (
    *("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "decoder.output_projection.weight",
)
INITIAL = ("spelling", "mean")
SPACE = "\u2581"  # in SentencePiece's pieces


def add_tokens(source, data, initial="spelling", like=None):
    """Let a model have the vocabulary of an extended data folder. It translates as before: the new
    tokens are marked as untrained, so that they are never chosen, until a training goes on from it.

    Args:
        source: :class:`~fairseq_smoe.conversion.source.Source`; it is changed.
        data: folder made by ``prepare --vocabulary-of`` the model's data.
        initial: row of a new piece in the embeddings: "spelling", the mean of the pieces that the
            text of the piece consists of in the model's vocabulary; or "mean", that of all tokens.
        like: language whose token the tokens of new languages begin as; None for the mean of all
            languages.

    Raises:
        OptionError: the vocabulary does not continue the model's, or has no new language; ``like``
            is unknown.
    """
    record = DataRecord.in_task_state(source.state.get("task_state") or {})
    before = _symbols_of(source, record)
    after = [*FAIRSEQ_SPECIALS, *read_dictionary(data / "dict.txt")]
    languages = read_languages(data / LANGS_FILE)
    if after[: len(before)] != before:
        raise OptionError(
            f"--data: the vocabulary of {source.path} is another than that which {data} continues; "
            "give the data folder of its training"
        )
    if like is not None and like not in record.languages:
        raise OptionError(
            f"--like {like}: the model knows {', '.join(record.languages)}; choose one of them"
        )
    number = len(after) - len(before)
    trained = len(before) - source.options.untrained_tokens
    known = {symbol: i for i, symbol in enumerate(before[:trained])}
    examples = _examples(after[len(before) :], known, languages, initial, like, data)
    grown = {}  # embeddings are often the same tensor under several names
    for name in EMBEDDINGS:
        if name in source.parameters:
            rows_VD = source.take(name)
            place = rows_VD.data_ptr()
            if place not in grown:
                grown[place] = _with_rows(rows_VD, examples)
            source.parameters[name] = grown[place]
    source.set_options(untrained_tokens=source.options.untrained_tokens + number)
    text = "\n".join(after)
    record = DataRecord(dict.fromkeys(languages, text), languages, record.options)
    source.state["task_state"] |= record.to_task_state()
    source.set_task_options(langs=languages, data=str(data))
    return number


def _symbols_of(source, record):
    """All symbols of a model's dictionary.

    Raises:
        OptionError: they are not recorded, or differ between languages.
    """
    texts = set(record.dictionaries.values()) if record and record.dictionaries else set()
    if len(texts) != 1:
        reason = "its languages have different dictionaries" if texts else "records no dictionary"
        raise OptionError(f"{source.path}: {reason}, so that no language can be added to it")
    return texts.pop().split("\n")


def _examples(symbols, known, languages, initial, like, data):
    """For each new symbol the ids of those whose mean it begins as.

    Args:
        known: ``{symbol: id}`` of those that have been trained.
        languages: all, old and new.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / SPM_FILE))
    tokens = [language_token(lang) for lang in languages]
    similar = [language_token(like)] if like else tokens
    everything = range(len(FAIRSEQ_SPECIALS), len(known))
    found = []
    for symbol in symbols:
        if symbol in tokens:
            found.append([known[name] for name in similar if name in known])
        else:
            spelt = _spelling(symbol, processor) if initial == "spelling" else ()
            found.append([known[part] for part in spelt if part in known] or everything)
    return found


def _spelling(piece, processor):
    """The pieces that a piece's text consists of in an older model."""
    parts = processor.encode(piece.replace(SPACE, " "), out_type=str)
    if not piece.startswith(SPACE):  # SentencePiece puts a space in front of every text
        parts = [part.removeprefix(SPACE) if i == 0 else part for i, part in enumerate(parts)]
    return parts


def _with_rows(rows_VD, examples):
    """An embedding with new rows behind its own, each the mean of some of them."""
    new_ND = rows_VD.new_empty(len(examples), rows_VD.shape[1])
    for row_D, own in zip(new_ND, examples):
        row_D.copy_(rows_VD[list(own)].float().mean(dim=0))
    return torch.cat([rows_VD, new_ND])
