"""--replace-unk: unknown words are copied from the source, or replaced by those of a file."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from toy_task import generate, interactive

from fairseq_smoe.errors import OptionError
from fairseq_smoe.generation.replace_unk import UnknownWords, read_replacements

# makes a model translate into nothing but unknown words
UNKNOWN = {"unkpen": -100, "max_len_b": 4}


def test_words_of_the_source_or_of_a_file(data, trained, tmp_path):
    file = tmp_path / "pairs"
    file.write_text("en1 eins\n\nzzz häßlich\n")
    lines = ["zzz", "en3 en1", "wörd"]
    options = (data, trained("smoe"), lines, "en-aa")
    copied = interactive(*options, "--replace-unk", **UNKNOWN).sentences
    found = [set(copied[i][1].split()) for i in range(3)]
    assert found[0] == {"zzz"} and found[2] == {"wörd"}
    assert found[1] and found[1] <= {"en3", "en1"}
    replaced = interactive(*options, replace_unk=file, **UNKNOWN).sentences
    found = [set(replaced[i][1].split()) for i in range(3)]
    assert found[0] == {"häßlich"} and found[2] == {"wörd"}
    assert found[1] and found[1] <= {"en3", "eins"}


def test_binarised_text(data, trained, text):
    """Known words of the source are copied, and the scorer goes on."""
    printed = generate(data, trained("smoe"), "en-aa", "--replace-unk", "--sacrebleu", **UNKNOWN)
    sources = (text / "test.en-aa.en").read_text().splitlines()
    for i, (_, sentence) in printed.sentences.items():
        assert set(sentence.split()) <= set(sources[i].split())
    assert "BLEU = " in printed.stdout


def test_the_word_with_most_attention():
    source, target = Dictionary(), Dictionary()
    token = source.add_symbol("__aa__")
    words = [source.add_symbol(f"s{i}") for i in range(3)]
    target.add_symbol("t0")
    task = SimpleNamespace(
        source_dictionary=source,
        target_dictionary=target,
        args=SimpleNamespace(source_lang="en", target_lang="aa", langtoks={"main": ("tgt", "tgt")}),
        data_manager=SimpleNamespace(get_encoder_langtok=lambda *_: token),
    )
    source_S = torch.tensor([source.pad(), token, *words, source.eos()])
    tokens = torch.tensor([target.unk(), target.index("t0"), target.unk(), target.eos()])
    attention = torch.zeros(6, 4)
    attention[:, 0] = torch.tensor([9, 9, 1, 2, 1, 9.0])  # padding and tokens do not count
    attention[:, 2] = torch.tensor([0, 0, 0, 0, 1, 0.0])
    hypothesis = {"tokens": tokens, "attention": attention}
    UnknownWords(task, {"s2": "two"})._replace(hypothesis, source_S)
    assert target.string(tokens) == "s1 t0 two"


@pytest.mark.parametrize(
    "content, message", [("a b c\n", "line 1 has 3 words"), (b"\xff \xff\n", "cannot be read")]
)
def test_a_damaged_file(tmp_path, content, message):
    file = tmp_path / "pairs"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match=message):
        read_replacements(file)
