"""``from_pretrained``: a model as an object that translates plain text."""

import re

import pytest
import toy_task
from fairseq.models.transformer import TransformerModel
from toy_task import REPOSITORY, generate, run

import fairseq_smoe
from fairseq_smoe.errors import OptionError
from fairseq_smoe.translation.model import SMoETransformer

fairseq_smoe.register()  # other tests of this process may have imported it without fairseq


def load(data, checkpoint, cls=SMoETransformer, **options):
    return cls.from_pretrained(str(checkpoint.parent), checkpoint.name, str(data), **options)


@pytest.fixture(scope="module", params=[SMoETransformer, TransformerModel])
def model(request, data, trained):
    return load(data, trained("smoe"), request.param, source_lang="en", target_lang="aa")


def test_translate(model, data, text, trained):
    sources = (text / "test.en-aa.en").read_text().splitlines()[:12]
    expected = generate(data, trained("smoe"), "en-aa", beam=5).sentences
    assert model.translate(sources) == [expected[i][1] for i in range(12)]
    assert model.translate(sources[3]) == expected[3][1]
    assert model.translate([]) == [] and model.score([], []) == []
    assert model.translate(["en1 en2", "", "en4 en5"]) == ["aa2 aa1", "", "aa5 aa4"]
    for sentence in model.sample(sources, sampling=True, temperature=3.0):
        assert sentence and "__" not in sentence


def test_a_sentence_that_is_too_long(model, capsys):
    """It is cut, with a warning, and the others are translated."""
    found = model.translate(["en1 en2", "en3 " * 2000, "en4 en5"])
    assert found[::2] == ["aa2 aa1", "aa5 aa4"]
    assert "sentence 2: more than the 1024 tokens" in capsys.readouterr().err


def test_encode_and_decode(model):
    tokens = model.encode("en1 en2")
    assert model.decode(tokens) == "en1 en2" and len(tokens) == 3


def test_hypotheses_have_no_language_token(model):
    batch = [model.encode("en1 en2 en3"), model.encode("en4")]
    for hypotheses, words in zip(model.generate(batch, beam=3), ("aa3 aa2 aa1", "aa4")):
        assert len(hypotheses) == 3
        assert model.decode(hypotheses[0]["tokens"]) == words
        for hypothesis in hypotheses:
            assert "__" not in model.tgt_dict.string(hypothesis["tokens"])
            assert len(hypothesis["positional_scores"]) == len(hypothesis["tokens"])
    (best, *_) = model.generate(batch[0], beam=2)
    assert model.decode(best["tokens"]) == "aa3 aa2 aa1"


def test_score(model):
    """As the search has scored the same translation, token by token."""
    best = model.generate(model.encode("en1 en2 en3"), beam=1)[0]
    scored = model.score("en1 en2 en3", "aa3 aa2 aa1")
    assert scored["tokens"].tolist() == best["tokens"].tolist()
    assert scored["positional_scores"].tolist() == pytest.approx(
        best["positional_scores"].tolist(), abs=1e-4
    )
    assert scored["score"].item() == pytest.approx(scored["positional_scores"].mean().item())
    several = model.score(["en1", "en1 en2 en3"], ["aa5", "aa3 aa2 aa1"])
    assert several[1]["score"].item() == pytest.approx(scored["score"].item(), abs=1e-4)
    assert several[0]["score"] < several[1]["score"]
    with pytest.raises(OptionError, match="2 sentences and 1 translations"):
        model.score(["en1", "en2"], ["aa1"])


def test_allowed_tokens_see_no_language_token(model):
    seen, word = [], model.tgt_dict.index("aa2")

    def allowed(sentence, prefix):
        seen.append(model.tgt_dict.string(prefix))
        return [word] if len(prefix) < 3 else [model.tgt_dict.eos()]

    assert model.translate("en1", prefix_allowed_tokens_fn=allowed) == "aa2 aa2"
    assert not any("__" in text for text in seen)


def test_directions_share_the_model(model):
    other = model.direction("bb", "en")
    assert other.translate("bb1 bb2") == "en1 en2"
    assert other.models[0] is model.models[0]
    assert model.translate("en1 en2") == "aa2 aa1"


def test_a_direction_is_needed(data, trained):
    model = load(data, trained("smoe"))
    assert model.direction("bb", "en").translate("bb1 bb2") == "en1 en2"
    with pytest.raises(OptionError, match="--target-lang"):
        model.translate("en1")


# --------------------------------------------------------------------------------------
# the page


@pytest.fixture(scope="module")
def in_pieces(make_once, text):
    """A folder with ``data-bin`` in SentencePiece pieces, and ``checkpoints`` of a few updates."""

    def make(folder):
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=f"{text / 'train.en-aa.en'},{text / 'train.en-aa.aa'}",
            model_prefix=str(folder / "spm"),
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
        words = [pieces.id_to_piece(i) for i in range(3, len(pieces))]
        (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
        for lang, toy in (("en", "en"), ("de", "aa")):
            lines = (text / f"valid.en-aa.{toy}").read_text().splitlines()
            encoded = (" ".join(pieces.encode(line, out_type=str)) for line in lines)
            (folder / f"train.{lang}").write_text("\n".join(encoded) + "\n")
        data = folder / "data-bin"
        run(
            *("fairseq-preprocess", "--source-lang", "en", "--target-lang", "de"),
            *("--trainpref", folder / "train", "--destdir", data),
            *("--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt"),
        )
        (data / "langs.txt").write_text("de\nen\n")
        (folder / "spm.model").rename(data / "spm.model")
        options = {"lang_pairs": "en-de,de-en", "max_update": 3, "disable_validation": True}
        toy_task.train(data, folder / "checkpoints", *toy_task.MODELS["smoe"], **options)

    return make_once("in-pieces", make)


def test_the_code_of_the_page(in_pieces, monkeypatch):
    page = (REPOSITORY / "docs/library.md").read_text()
    (block,) = re.findall(
        r"(?:^(?:    .*)?\n)*.*from_pretrained\((?:.*\n)(?:^(?:    .*)?\n)*", page, re.M
    )
    code = re.sub("^    ", "", block, flags=re.M)
    code = code.replace("checkpoint_best.pt", "checkpoint_last.pt")
    monkeypatch.chdir(in_pieces)
    found = {}
    exec(compile(code, "library.md", "exec"), found)
    assert all(isinstance(found[name], str) for name in ("german", "english"))
    assert len(found["several"]) == 2 and found["scored"]["score"] < 0
    assert found["model"].decode(found["model"].encode("en1 en2")) == "en1 en2"
