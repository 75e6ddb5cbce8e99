"""``export --format ctranslate2``, with the real library."""

import pytest
import random_model
import readme_snippet
import sentencepiece
import toy_task

from fairseq_smoe.__main__ import main
from fairseq_smoe.errors import OptionError

ctranslate2 = pytest.importorskip("ctranslate2")
FORMAT = ["--format", "ctranslate2"]


@pytest.fixture(scope="module")
def exported(learned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctranslate2") / "model"
    main(["export", str(learned("dense")), *FORMAT, "--to", str(folder)])
    return folder


def translate(folder, texts, language, **options):
    """Pieces of the translations, without the language's token."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    first = f"__{language}__"
    found = open_folder(folder).translate_batch(
        [[first, *spm.encode(text, out_type=str)] for text in texts],
        target_prefix=[[first]] * len(texts),
        beam_size=5,
        max_decoding_length=201,
        **options,
    )
    return [each.hypotheses[0][1:] for each in found]


def open_folder(folder):
    return ctranslate2.Translator(str(folder), inter_threads=1, intra_threads=1)


def scores_of_words(folder, text, language, *translations):
    """Mean log-probabilities as CTranslate2's search has them: without that of the language."""
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    first = f"__{language}__"
    source = [first, *spm.encode(text, out_type=str)]
    scored = open_folder(folder).score_batch(
        [source] * len(translations), [[first, *pieces] for pieces in translations]
    )
    return [sum(each.log_probs[1:]) / len(each.log_probs) for each in scored]


@pytest.mark.parametrize("batch", [1, 64])
def test_translations_are_those_of_fairseq_generate(batch, exported, generated):
    equal = 0
    for direction, own in generated("dense").items():
        target = direction.split("-")[1]
        found = translate(exported, own.sources, target, max_batch_size=batch)
        for text, pieces, expected, cut_off in zip(
            own.sources, found, own.pieces, own.cut_off, strict=True
        ):
            equal += pieces == expected
            if pieces != expected and not (cut_off or len(pieces) >= 200):
                # neither the language nor the end of what is cut off has a score (docs/export.md)
                better, worse = scores_of_words(exported, text, target, pieces, expected)
                assert better > worse - 1e-5
    assert equal >= 230


def test_the_readme_says_how_to_translate(exported, generated, tmp_path):
    own = generated("dense")["en-aa"]
    assert readme_snippet.run(exported, own.sources[0], tmp_path) == own.lines[0]
    assert "library_name: ctranslate2\n" in (exported / "README.md").read_text()


def test_weights_in_8_bits(learned, exported, generated, tmp_path):
    folder = tmp_path / "int8"
    words = [*FORMAT, "--to", str(folder), "--quantization", "int8"]
    main(["export", str(learned("dense")), *words])
    sizes = [(path / "model.bin").stat().st_size for path in (folder, exported)]
    assert sizes[0] < 0.5 * sizes[1]
    own = generated("dense")["bb-en"]
    found = translate(folder, own.sources, "en")
    assert sum(a == b for a, b in zip(found, own.pieces)) > 0.8 * len(found)


def test_a_packed_model_is_exported_alike(learned, exported, tmp_path):
    packed, folder = tmp_path / "packed", tmp_path / "model"
    main(["pack", str(learned("dense")), "--to", str(packed)])
    main(["export", str(packed), *FORMAT, "--to", str(folder), "--name", "model"])
    for path in sorted(exported.iterdir()):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


REFUSED = {
    "knows dense models only": toy_task.MODELS["smoe"],
    "does not know --activation-fn tanh": [
        *("--moe-freq", "0", "--activation-fn", "tanh"),
    ],
    "expects positions": ["--moe-freq", "0", "--no-token-positional-embeddings"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_compute_is_refused_in_one_line(message, words_data):
    from fairseq_smoe.export.ctranslate2 import specification

    model, options, dictionary, _ = random_model.build(words_data, *REFUSED[message])
    with pytest.raises(OptionError, match=f"^--format ctranslate2: .*{message}") as caught:
        specification(model, options, dictionary)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--post-norm"],
        ["--layernorm-embedding"],
        ["--encoder-learned-pos", "--decoder-learned-pos"],
    ],
)
def test_other_dense_models_translate_alike(options, words_data, tmp_path):
    """What transformers cannot take: with the scores of the first tokens."""
    import torch

    from fairseq_smoe.export.ctranslate2_folder import write

    words = "--moe-freq", "0", "--activation-fn", "gelu", *options
    model, *parts, _ = random_model.build(words_data, *words)
    write(tmp_path, model, *parts, words_data / "spm.model")
    dictionary = parts[1]
    sources, _, targets = random_model.batch(dictionary)
    eos, text = dictionary.eos(), dictionary.symbols
    source = torch.cat([sources[:1], torch.tensor([[eos]])], dim=1)
    translator = ctranslate2.Translator(str(tmp_path), inter_threads=1, intra_threads=1)
    (found,) = translator.score_batch(
        [[text[i] for i in sources[0]]], [[text[i] for i in targets[0, 1:]]]
    )
    with torch.no_grad():
        logits, _ = model(source, torch.tensor([source.size(1)]), targets[:1])
    expected = logits[0].log_softmax(dim=1)
    following = [*targets[0, 1:].tolist(), eos]
    assert found.log_probs == pytest.approx(
        [expected[i, token].item() for i, token in enumerate(following)], abs=1e-4
    )
