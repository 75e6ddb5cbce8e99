"""``fairseq_smoe.Translator``."""

import random
import threading

import pytest
import toy_task

from fairseq_smoe import Translator
from fairseq_smoe.errors import OptionError
from fairseq_smoe.inference.long_text import split_text


@pytest.fixture(scope="module")
def translator(spoken):
    return Translator.load(spoken)


def everything(generated):
    """``(source text, source, target, translation, score)`` of all test sentences."""
    return [
        (text, *direction.split("-"), line, score)
        for direction, own in generated.items()
        for text, line, score in zip(own.sources, own.lines, own.scores, strict=True)
    ]


def test_translations_are_those_of_fairseq_generate(translator, generated):
    for direction, own in generated.items():
        found = translator.translate(own.sources, *direction.split("-"), with_scores=True)
        assert [each.text for each in found] == own.lines
        scores = [each.hypotheses[0].score for each in found]
        assert scores == pytest.approx(own.scores, abs=2e-4)
    assert sum(len(own.lines) for own in generated.values()) >= 200


def test_nothing_else_in_a_batch_changes_a_translation(translator, generated):
    cases = everything(generated)
    random.Random(1).shuffle(cases)
    texts, sources, targets, lines, _ = zip(*cases)
    for max_tokens in (150, 100_000):
        found = translator.translate(texts, sources, targets, max_tokens=max_tokens)
        assert [each.text for each in found] == list(lines)
    for text, source, target, line, _ in cases[:20]:
        assert translator.translate(text, source, target).text == line


def test_threads_do_not_disturb_one_another(translator, generated):
    cases = everything(generated)
    found, errors = {}, []

    def work(number):
        try:
            own = cases[number::8]
            texts, sources, targets, lines, _ = zip(*own)
            # other settings of the search in between
            translator.translate(texts[:2], sources[:2], targets[:2], beam=1 + number % 3)
            results = translator.translate(texts, sources, targets)
            found[number] = [each.text for each in results] == list(lines)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and found == dict.fromkeys(range(8), True)


def test_texts_without_words_have_empty_translations(translator):
    found = translator.translate(["", "en1 en2", " \t"], "en", "aa", n_best=2, with_scores=True)
    assert [each.text for each in found][::2] == ["", ""] and found[1].text == "aa2 aa1"
    assert [len(each.hypotheses) for each in found] == [2, 2, 2]
    assert translator.translate([], "en", "aa") == []


def test_several_translations_best_first(translator):
    (found,) = translator.translate(["en1 en2 en3"], "en", "aa", n_best=5, with_scores=True)
    scores = [each.score for each in found.hypotheses]
    assert scores == sorted(scores, reverse=True) and len({h.text for h in found.hypotheses}) == 5
    for each in found.hypotheses:
        assert len(each.piece_scores) == len(each.pieces) + 1
    plain = translator.translate("en1 en2 en3", "en", "aa")
    assert plain.hypotheses[0].score is None and plain.text == found.text


def test_sampling_draws(translator):
    draws = {translator.translate("en1 en2 en3", "en", "aa", sampling_topp=1.0).text for _ in "ab"}
    assert draws
    (sure,) = {translator.translate("en1 en2", "en", "aa", sampling_topp=0.01).text for _ in "abc"}
    assert sure == "aa2 aa1"


def test_models_together(spoken, generated):
    own = generated["en-aa"]
    both = Translator.load([spoken, spoken / "checkpoints" / "checkpoint_best.pt"])
    found = both.translate(own.sources, "en", "aa")
    assert [each.text for each in found] == own.lines


def test_8_bits_translate_nearly_the_same(spoken, generated):
    own = generated["en-bb"]
    found = Translator.load(spoken, dtype="int8").translate(own.sources, "en", "bb")
    same = sum(each.text == line for each, line in zip(found, own.lines))
    assert same > 0.6 * len(own.lines)  # which the model has not learned well


def test_models_with_other_languages_do_not_translate_together(spoken, spoken_data, tmp_path):
    toy_task.train(spoken_data, tmp_path, max_update=1, langs="aa,bb,cc,en")
    with pytest.raises(OptionError, match="other languages than"):
        Translator.load([spoken, tmp_path / "checkpoint_last.pt"])


def test_long_text_is_split_between_sentences_shortened_or_refused(translator, monkeypatch):
    monkeypatch.setattr(translator, "_longest", 8)
    text = "en1 en2 en3. en4 en5"
    whole = translator.translate(text, "en", "aa")
    parts = translator.translate(["en1 en2 en3.", "en4 en5"], "en", "aa")
    assert whole.text == " ".join(part.text for part in parts)
    short = translator.translate(text, "en", "aa", long_text="shorten")
    assert short.text != whole.text and len(short.text) < len(whole.text)
    with pytest.raises(OptionError, match="text 2: has .* tokens, and the model takes 7"):
        translator.translate(["en1", text], "en", "aa", long_text="refuse")


def test_splitting_keeps_every_word():
    text = 'One two. "Three four five!" Six seven eight nine ten. 七八。九十。'
    for most in (1, 3, 12, 20, 100):
        parts = split_text(text, lambda part, most=most: len(part) <= most)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(len(part) <= most or " " not in part for part in parts)
    assert split_text(text, lambda part: len(part) <= 30)[:2] == [
        'One two. "Three four five!"',
        "Six seven eight nine ten. 七八。",
    ]


def test_mistakes_are_told(translator, spoken, tmp_path, caplog):
    for options, message in (
        (dict(source="xx"), "source xx: the model knows aa, bb, en"),
        (dict(target="xx"), "target xx: the model knows"),
        (dict(beam=0), "beam 0: expected 1 or more"),
        (dict(n_best=6), r"n_best 6: expected 1 to beam \(5\)"),
        (dict(sampling_topp=2), "sampling_topp 2: expected above 0"),
        (dict(long_text="cut"), "long_text cut: expected split or"),
    ):
        with pytest.raises(OptionError, match=message):
            translator.translate(["en1"], **{"source": "en", "target": "aa", **options})
    for _ in "ab":
        translator.translate("aa1", "aa", "bb")
    warnings = [r.message for r in caplog.records if "not trained" in r.message]
    assert warnings == ["aa-bb: the model was not trained in this direction"]
    for path, message in (
        (tmp_path / "no", "no such file or folder"),
        (tmp_path, "neither a packed model nor a folder with"),
    ):
        with pytest.raises(OptionError, match=message):
            Translator.load(path)
    with pytest.raises(OptionError, match=f"data {tmp_path}: has no spm.model"):
        Translator.load(spoken, data=tmp_path)
    with pytest.raises(OptionError, match="dtype int3: expected float32"):
        Translator.load(spoken, dtype="int3")
