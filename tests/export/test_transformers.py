"""``export --format transformers``, with the real library."""

import json
import math

import pytest
import random_model
import readme_snippet
import torch
import toy_task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_smoe.__main__ import main
from fairseq_smoe.errors import OptionError
from fairseq_smoe.export import transformers_folder
from fairseq_smoe.export.transformers_model import configuration
from fairseq_smoe.inference.text_coder import TextCoder

NAMES = ("dense", "vanilla", "strata")


@pytest.fixture(scope="session")
def exported(learned, tmp_path_factory):
    """``exported(name)``: folder of an exported model."""
    found = {}

    def exported(name):
        if name not in found:
            found[name] = tmp_path_factory.mktemp("transformers") / name
            words = ["--format", "transformers", "--to", str(found[name]), "--license", "mit"]
            main(["export", str(learned(name)), *words])
        return found[name]

    return exported


def load(transformers, folder):
    """``(model, tokenizer)``. Only what needs code of the folder may run it."""
    config = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, trust_remote_code="auto_map" in config
    )
    return model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def translate(model, tokenizer, texts, direction):
    return translate_with_scores(model, tokenizer, texts, direction)[0]


def translate_with_scores(model, tokenizer, texts, direction):
    """``(lines, scores)``, the scores as fairseq-generate prints them."""
    tokenizer.src_lang, tokenizer.tgt_lang = direction.split("-")
    found = model.generate(
        **tokenizer(texts, padding=True, return_tensors="pt"),
        logits_processor=[tokenizer.rules()],
        return_dict_in_generate=True,
        output_scores=True,
    )
    lines = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    return lines, (found.sequences_scores / math.log(2)).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_translations_are_those_of_fairseq_generate(name, transformers, exported, generated):
    model, tokenizer = load(transformers, exported(name))
    expected = "M2M100" if name == "dense" else "SMoE"
    assert type(model).__name__ == f"{expected}ForConditionalGeneration"
    lines = {line for own in generated(name).values() for line in own.lines}
    assert len(lines) > 60  # the model has learned something
    for direction, own in generated(name).items():
        lines, scores = translate_with_scores(model, tokenizer, own.sources, direction)
        assert lines == own.lines
        assert scores == pytest.approx(own.scores, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_else_is_in_a_batch_changes_nothing(name, transformers, exported, generated):
    model, tokenizer = load(transformers, exported(name))
    for direction, own in generated(name).items():
        for i in range(0, len(own.sources), 6):
            assert translate(model, tokenizer, own.sources[i], direction) == [own.lines[i]]


def test_the_readme_says_how_to_translate(transformers, exported, generated, tmp_path):
    folder = exported("strata")
    own = generated("strata")["en-aa"]
    printed = readme_snippet.run(folder, own.sources[0], tmp_path)
    assert printed == repr([own.lines[0]])
    text = (folder / "README.md").read_text()
    assert "license: mit\n" in text and "library_name: transformers\n" in text
    assert "strata 2-2 (" in text


def test_a_model_with_experts_does_not_load_as_another(transformers, exported):
    with pytest.raises(ValueError, match="trust_remote_code|smoe"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(
            exported("strata"), trust_remote_code=False
        )


def test_saving_it_again_changes_nothing(transformers, exported, generated, tmp_path):
    model, tokenizer = load(transformers, exported("strata"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load(transformers, tmp_path)
    own = generated("strata")["en-bb"]
    assert translate(model, tokenizer, own.sources, "en-bb") == own.lines


def test_it_trains(transformers, exported, generated):
    model, tokenizer = load(transformers, exported("strata"))
    tokenizer.src_lang, tokenizer.tgt_lang = "en", "aa"
    own = generated("strata")["en-aa"]
    batch = tokenizer(own.sources[:8], text_target=own.lines[:8], padding=True, return_tensors="pt")
    labels = batch["labels"]
    first = tokenizer.language_id("aa")
    assert (labels[:, 0] == first).all() and labels[0, -1] in (1, 2)
    batch["labels"] = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


# rows of the paper and options that change what is computed, at sizes that differ everywhere
SIZES = (
    *("--encoder-layers", "3", "--decoder-layers", "2", "--encoder-ffn-embed-dim", "96"),
    *("--decoder-ffn-embed-dim", "80", "--encoder-attention-heads", "2"),
)
COMPUTED_ALIKE = {
    "dense": ["--moe-freq", "0", *SIZES],
    "dense with other options": [
        *("--moe-freq", "0", "--no-scale-embedding", "--activation-fn", "gelu_accurate"),
    ],
    "vanilla": ["--smoe-strata", "5", *SIZES, "--moe-ffn-dim", "48"],
    "switch": ["--smoe-strata", "5", "--moe-top1-expert", "--activation-fn", "tanh"],
    "strata": ["--smoe-strata", "1-2-3", "--moe-freq", "1"],
    "a last stratum of one": ["--smoe-strata", "3-1", "--decoder-moe-freq", "0"],
    "released": ["--smoe-strata", "2-3", "--smoe-norm", "released", "--moe-freq", "1"],
    "top-1 in strata": ["--smoe-strata", "2-3", "--moe-top1-expert", "--moe-gate-bias"],
    "factors": ["--smoe-strata", "2-3", "--moe-eom", "0.3", "--smoe-pass-scale", "1,0.5"],
    "fine experts": ["--smoe-strata", "2-2", "--moe-ffn-split", "2"],
}


@pytest.mark.parametrize("options", COMPUTED_ALIKE.values(), ids=COMPUTED_ALIKE.keys())
def test_logits_are_those_of_the_model(options, transformers, words_data, tmp_path):
    model, *parts = random_model.build(words_data, *options)
    transformers_folder.write(tmp_path, model, *parts, words_data / "spm.model")
    other, _ = load(transformers, tmp_path)
    sources, lengths, targets = random_model.batch(parts[1])
    with torch.no_grad():
        expected, _ = model(sources, lengths, targets)
        found = other(
            input_ids=sources,
            attention_mask=sources.ne(parts[1].pad()).long(),
            decoder_input_ids=targets,
        ).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


REFUSED = {
    "knows --moe-gate top-k, not threshold": ["--smoe-strata", "4-4", "--moe-gate", "threshold"],
    "knows --moe-experts ffn, not tensor-product": toy_task.MODELS["mpoe"],
    "CMR": toy_task.MODELS["cmr"],
    "stacking": toy_task.MODELS["stacking"],
    "heads": toy_task.MODELS["multi-head"],
    "expects LayerNorms": ["--moe-freq", "0", "--post-norm"],
    "expects sinusoidal positions": ["--moe-freq", "0", "--encoder-learned-pos"],
    "does not know --layernorm-embedding": ["--moe-freq", "0", "--layernorm-embedding"],
    "expects experts of the same width": ["--smoe-strata", "2-2", *SIZES],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(message, words_data):
    model, options, dictionary, _ = random_model.build(words_data, *REFUSED[message])
    with pytest.raises(OptionError, match=f"^--format transformers: .*{message}") as caught:
        configuration(model, options, dictionary)
    assert "\n" not in str(caught.value) and "use 'translate' and 'serve'" in str(caught.value)


def test_a_part_that_nobody_has_thought_of_is_refused(words_data):
    model, options, dictionary, _ = random_model.build(words_data, "--moe-freq", "0")
    model.encoder.layers[0].w_resid = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(OptionError, match="has no place for the parameter encoder.layers.0.w_res"):
        configuration(model, options, dictionary)


@pytest.fixture(scope="module")
def coders(transformers, exported, words_data):
    """``(tokenizer of the exported folder, TextCoder, dictionary)``"""
    folder = exported("dense")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=True, src_lang="en", tgt_lang="aa"
    )
    from fairseq.data import Dictionary

    dictionary = Dictionary.load(str(words_data / "dict.en.txt"))
    for language in ("aa", "bb", "en"):
        dictionary.add_symbol(f"__{language}__")
    return tokenizer, TextCoder(words_data / "spm.model", dictionary), dictionary


ODD = [
    "",
    " ",
    "enn  ens",
    " enn\tens\n",
    "</s> enn",
    "__aa__",
    "<unk><pad>",
    "é ﬁ Ⅷ 你好",
    "enn\u00a0x\u2028y",
]


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.sampled_from(ODD) | st.text(max_size=30) | st.text("aenbkonpqrst ▁</s>", max_size=40))
def test_any_text_has_the_ids_of_ours(coders, text):
    tokenizer, coder, dictionary = coders
    ids = coder.encode(text, "en").tolist()
    found = tokenizer(text)["input_ids"]
    assert found == [dictionary.index("__aa__"), *ids]
    assert tokenizer([text, "enn"])["input_ids"][0] == found
    decoded = tokenizer.decode(found, skip_special_tokens=True)
    assert decoded == coder.text(coder.pieces(torch.tensor(ids)))


def test_a_language_that_is_missing_is_named(coders):
    tokenizer, _, _ = coders
    with pytest.raises(ValueError, match="language 'xx': expected one of aa, bb, en"):
        tokenizer.language_id("xx")
    before, tokenizer.tgt_lang = tokenizer.tgt_lang, None
    try:
        with pytest.raises(ValueError, match="tgt_lang is not set"):
            tokenizer("enn")
    finally:
        tokenizer.tgt_lang = before
