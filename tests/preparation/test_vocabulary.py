"""The sample that SentencePiece is trained on, the model, and the dictionary made of it."""

from collections import Counter

import numpy as np
import pytest
import sentencepiece as spm
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import augment_dictionary
from hypothesis import given
from hypothesis import strategies as st

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import vocabulary

COUNTS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 10_000), min_size=1)


@pytest.fixture
def model(tmp_path):
    """A model of a text that is full of what fairseq reserves."""
    rng = np.random.default_rng(0)
    words = ["<pad>", "</s>", "<s>", "<unk>", "__de__", "word", "other", "more"]
    text = tmp_path / "sample.txt"
    text.write_text("".join("".join(rng.choice(words, 5)) + "\n" for _ in range(500)))
    vocabulary.train_sentencepiece(text, tmp_path / "spm.model", 25, 1.0)
    return spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))


@given(COUNTS, st.sampled_from([1, 1.5, 5, 100]))
def test_shares_follow_their_definition(counts, temperature):
    shares = vocabulary.language_shares(counts, temperature)
    assert sum(shares.values()) == pytest.approx(1)
    for a in counts:
        for b in counts:
            ratio = (counts[a] / counts[b]) ** (1 / temperature)
            assert shares[a] / shares[b] == pytest.approx(ratio)


@given(COUNTS, st.sampled_from([1, 5]), st.integers(1, 50_000))
def test_no_line_is_drawn_twice_and_none_is_missing(counts, temperature, num_lines):
    sizes = vocabulary.sample_sizes(counts, temperature, num_lines)
    assert all(0 <= sizes[lang] <= counts[lang] for lang in counts)
    assert abs(sum(sizes.values()) - min(num_lines, sum(counts.values()))) <= len(counts)
    # those that are not used up are in proportion
    part = {lang: n for lang, n in counts.items() if sizes[lang] < n}
    shares = vocabulary.language_shares(part, temperature) if part else {}
    total = sum(sizes[lang] for lang in part)
    assert all(abs(sizes[lang] - shares[lang] * total) <= len(counts) for lang in part)


def sample(folder, temperature, num_lines, seed=1):
    """Lines per language of a sample of two languages with 3000 and 30 + 270 lines."""
    files = {"en": [folder / "en"], "de": [folder / "de1", folder / "de2"]}
    counts = {folder / "en": 3000, folder / "de1": 30, folder / "de2": 270}
    for path, lines in counts.items():
        path.write_text("".join(f"{path.name} {i}\n" for i in range(lines)))
    target = folder / "sample.txt"
    vocabulary.write_sample(files, counts, target, temperature, num_lines, seed)
    return target.read_text().splitlines()


def test_a_sample_is_drawn_at_the_given_temperature(tmp_path):
    lines = sample(tmp_path, 1, 330)
    assert len(set(lines)) == len(lines) == 330
    assert Counter(line[:2] for line in lines) == {"en": 300, "de": 30}
    assert {line[:3] for line in lines} == {"en ", "de1", "de2"}
    assert Counter(line[:2] for line in sample(tmp_path, 1e9, 330)) == {"en": 165, "de": 165}
    assert Counter(line[:2] for line in sample(tmp_path, 1e9, 900)) == {"en": 600, "de": 300}
    assert len(sample(tmp_path, 5, 10**6)) == 3300


def test_a_sample_depends_on_the_seed_alone(tmp_path):
    assert sample(tmp_path, 1, 100) == sample(tmp_path, 1, 100)
    assert sample(tmp_path, 1, 100) != sample(tmp_path, 1, 100, seed=2)


def test_language_tokens_do_not_depend_on_the_order_of_languages(model, tmp_path):
    symbols = vocabulary.joint_symbols(model, ["de", "en", "nl"])
    vocabulary.write_dictionary(symbols, tmp_path / "dict.txt")
    tokens = {}
    for order in (["de", "en", "nl"], ["nl", "en", "de"], ["en"]):
        dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
        augment_dictionary(dictionary, order, "multilingual")
        for lang in order:
            token = vocabulary.language_token(lang)
            assert tokens.setdefault(token, dictionary.index(token)) == dictionary.index(token)
    assert len(set(tokens.values())) == 3 and dictionary.unk() not in tokens.values()


def test_numbers_are_those_that_fairseq_gives_the_pieces(model, tmp_path):
    symbols = vocabulary.joint_symbols(model, ["de", "en"])
    vocabulary.write_dictionary(symbols, tmp_path / "dict.txt")
    assert vocabulary.read_dictionary(tmp_path / "dict.txt") == symbols
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    pieces = [model.id_to_piece(i) for i in range(3, len(model))]
    expected = [dictionary.index(piece) for piece in pieces]
    assert vocabulary.fairseq_ids(model, symbols)[3:].tolist() == expected
    assert len(set(expected)) == len(expected) and min(expected) == 4
    assert (dictionary.pad(), dictionary.eos(), dictionary.unk()) == (1, 2, 3)


def test_the_model_is_the_same_every_time(tmp_path):
    lines = sample(tmp_path, 1, 2000)
    (tmp_path / "sample.txt").write_text("".join(f"{line} {line[::-1]}\n" for line in lines))
    models = []
    for _ in range(2):
        vocabulary.train_sentencepiece(tmp_path / "sample.txt", tmp_path / "spm.model", 60, 1.0)
        models.append((tmp_path / "spm.model").read_bytes())
    assert models[0] == models[1]


def test_a_vocabulary_that_is_too_large_is_named(tmp_path):
    sample(tmp_path, 1, 10)
    with pytest.raises(OptionError, match="--vocab-size 5000: SentencePiece says: .*too high"):
        vocabulary.train_sentencepiece(tmp_path / "sample.txt", tmp_path / "spm.model", 5000, 1.0)
