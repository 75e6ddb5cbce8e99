"""The joint SentencePiece vocabulary: a sample of the text, the model, and fairseq's dictionary."""

import io
from itertools import islice

import numpy as np
import sentencepiece as spm

from fairseq_smoe.errors import OptionError
from fairseq_smoe.files import whole_file, write_whole

FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # at the head of every dictionary
# The result depends on it, through the order of floating point sums; so it is fixed, and not the
# number of cores
TRAINING_THREADS = 8
MOST_BYTES = 1_000_000  # of a sentence that SentencePiece is trained on, which skips longer ones


def language_shares(counts, temperature):
    """Probability of each language: proportional to ``(n_l / N) ** (1 / temperature)``.

    Args:
        counts: ``{language: number of lines}``.
        temperature: 1 samples by size, larger values more evenly.
    """
    total = sum(counts.values())
    weights = {lang: (n / total) ** (1 / temperature) for lang, n in counts.items()}
    norm = sum(weights.values())
    return {lang: weight / norm for lang, weight in weights.items()}


def sample_sizes(counts, temperature, num_lines):
    """How many lines to draw of each language, without drawing any line twice.

    If a language has too few lines, more are drawn from the others, in proportion to their shares.
    """
    sizes, left = {}, min(num_lines, sum(counts.values()))
    open_langs = dict(counts)
    while open_langs:
        shares = language_shares(open_langs, temperature)
        exhausted = {lang: n for lang, n in open_langs.items() if shares[lang] * left >= n}
        if not exhausted:
            return sizes | {lang: int(shares[lang] * left + 1e-6) for lang in open_langs}
        sizes |= exhausted
        left -= sum(exhausted.values())
        open_langs = {lang: n for lang, n in open_langs.items() if lang not in exhausted}
    return sizes


def write_sample(files, counts, path, temperature, num_lines, seed):
    """Write lines drawn at random from the training text of every language.

    Args:
        files: ``{language: its files}``; English has one for every pair.
        counts: lines of each file.
        num_lines: lines of the sample, of all languages together.
    """
    totals = {lang: sum(counts[file] for file in files[lang]) for lang in files}
    sizes = sample_sizes(totals, temperature, num_lines)
    with whole_file(path) as sample:
        for number, lang in enumerate(sorted(files)):
            rng = np.random.default_rng([seed, number])
            chosen = np.sort(rng.choice(totals[lang], sizes[lang], replace=False, shuffle=False))
            start = 0
            for file in files[lang]:
                stop = start + counts[file]
                first, last = np.searchsorted(chosen, (start, stop))
                with open(file, "rb") as lines:
                    sample.writelines(lines_at(chosen[first:last] - start, lines))
                start = stop


def lines_at(numbers, lines):
    """The lines with these numbers, which are sorted."""
    skipped = np.diff(numbers, prepend=-1) - 1
    return (next(islice(lines, skip, None)) for skip in skipped.tolist())


def train_sentencepiece(sample, model_path, vocab_size, character_coverage):
    """Train a unigram model on a sample.

    Raises:
        OptionError: the sample is too small for the vocabulary, or has too many characters.
    """
    model = io.BytesIO()  # given file names, SentencePiece keeps them in the model
    try:
        with open(sample, encoding="utf-8", newline="\n") as lines:
            spm.SentencePieceTrainer.train(
                sentence_iterator=(line.rstrip("\n") for line in lines),
                model_writer=model,
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                input_sentence_size=0,
                max_sentence_length=MOST_BYTES,
                num_threads=TRAINING_THREADS,
                minloglevel=1,
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]  # without the line of code
        reason = reason.replace("--character_coverage", "--character-coverage")
        raise OptionError(f"--vocab-size {vocab_size}: SentencePiece says: {reason}") from error
    with whole_file(model_path) as handle:
        handle.write(model.getvalue())


def language_token(lang):
    """The token of a language as ``smoe_translation`` looks it up."""
    return f"__{lang}__"


def model_pieces(model):
    """The pieces of a SentencePiece model in its order, without the special ones."""
    return [
        model.id_to_piece(i)
        for i in range(model.get_piece_size())
        if not (model.is_control(i) or model.is_unknown(i))
    ]


def write_dictionary(symbols, path):
    """fairseq's dictionary: one symbol a line. Because it has the tokens of the languages, their
    ids do not depend on the order in which languages are later given to fairseq."""
    write_whole(path, "".join(f"{symbol} 1\n" for symbol in symbols))


def read_dictionary(path):
    """The symbols of a dictionary file."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        return [line.rpartition(" ")[0] for line in lines if line != "\n"]


def joint_symbols(model, langs):
    """The pieces of a model, then the tokens of the languages. No piece is like a token of fairseq
    or a language: SentencePiece splits <s> and __de__, in which letters and signs mix."""
    return model_pieces(model) + [language_token(lang) for lang in langs]


def fairseq_ids(model, symbols):
    """The id in fairseq's dictionary of every SentencePiece id; (pieces,) int64.

    Args:
        symbols: those of the dictionary file.
    """
    known = {symbol: i for i, symbol in enumerate(symbols, len(FAIRSEQ_SPECIALS))}
    table = np.empty(model.get_piece_size(), dtype=np.int64)
    for i in range(len(table)):
        if model.is_control(i):
            table[i] = FAIRSEQ_SPECIALS.index("</s>")  # encoding produces no other
        else:
            table[i] = known.get(model.id_to_piece(i), FAIRSEQ_SPECIALS.index("<unk>"))
    return table
