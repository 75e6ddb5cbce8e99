"""``import-nllb``, with models of the real classes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import random_model
import sentencepiece
import torch
import toy_task

from fairseq_smoe import Translator
from fairseq_smoe.__main__ import main
from fairseq_smoe.checkpoints import files
from fairseq_smoe.inference.loading import load_model
from fairseq_smoe.inference.text_coder import TextCoder

LANGUAGES = ["aa_Latn", "bb_Latn", "en_Latn"]
# everything at a size of its own; expert layers at different distances
CONFIG = {
    "vocab_size": 44,  # 3 more than the tokenizer has
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "num_experts": 5,
    "expert_capacity": 3,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 3,
    "router_bias": True,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}


@pytest.fixture(scope="module")
def saved(transformers, words_data, tmp_path_factory):
    """``saved.folder``, as ``save_pretrained`` leaves a random model and its tokenizer, and
    ``saved.model``."""
    folder = tmp_path_factory.mktemp("nllb") / "saved"
    folder.mkdir()
    shutil.copyfile(words_data / "spm.model", folder / "sentencepiece.bpe.model")
    tokenizer = transformers.NllbTokenizer.from_pretrained(
        folder, additional_special_tokens=LANGUAGES, src_lang="en_Latn"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = transformers.NllbMoeForConditionalGeneration(transformers.NllbMoeConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model.eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "model"
    main(["import-nllb", str(saved.folder), "--to", str(folder)])
    return folder


def route(model):
    """Let the expert layers apply the experts that their routers choose.

    From transformers 5.0 on they apply experts 0 and 1 to all tokens. Here every expert is applied
    to every token, and most outputs are multiplied by 0.
    """

    def forward(sublayer):
        def run(x, padding_mask=None):
            flat = x.reshape(-1, x.shape[-1])
            _, weights, _ = sublayer.router(flat, padding_mask)
            assert ((weights > 0).sum(dim=1) <= 2).all()
            kept = 1 - sublayer.experts.moe_token_dropout
            outputs = (
                sublayer.experts[f"expert_{i}"](flat) * weights[:, i : i + 1] * kept
                for i in range(sublayer.num_experts)
            )
            return sum(outputs).view_as(x)

        return run

    for module in model.modules():
        if type(module).__name__ == "NllbMoeSparseMLP":
            module.forward = forward(module)


def test_logits_are_those_of_the_original(transformers, saved, imported):
    if int(transformers.__version__.split(".")[0]) >= 5:
        route(saved.model)
    loaded = load_model(imported)
    dictionary = loaded.task.source_dictionary
    assert len(dictionary) == CONFIG["vocab_size"]
    sources, lengths, targets = random_model.batch(dictionary)
    with torch.no_grad():
        expected = saved.model(
            input_ids=sources,
            attention_mask=sources.ne(1).long(),
            decoder_input_ids=targets,
        ).logits
        found, _ = loaded.models[0](sources, lengths, targets)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_words_and_languages_have_the_ids_of_the_original(saved, imported):
    loaded = load_model(imported)
    dictionary = loaded.task.source_dictionary
    assert loaded.task.langs == LANGUAGES
    vocabulary = saved.tokenizer.get_vocab()
    assert len(vocabulary) == 41
    for word, i in vocabulary.items():
        assert dictionary.index(f"__{word}__" if word in LANGUAGES else word) == i
    # SentencePiece's ids are one less, as in NLLB
    spm = sentencepiece.SentencePieceProcessor(model_file=str(loaded.spm))
    coder = TextCoder(loaded.spm, dictionary)
    text = "enn ens bbt"
    expected = [*(i + 1 for i in spm.encode(text)), dictionary.eos()]
    assert coder.encode(text, LANGUAGES[0]).tolist() == expected
    assert loaded.task.args.encoder_langtok == "src" and loaded.task.args.decoder_langtok


def test_it_translates(imported, tmp_path):
    translator = Translator.load(imported)
    assert translator.languages == LANGUAGES
    assert len(translator.directions) == 6
    found = translator.translate(["enn ens", "enk"], "en_Latn", "aa_Latn", max_len=10)
    assert len(found) == 2 and all(isinstance(each.text, str) for each in found)
    moved = imported.rename(tmp_path / "moved")
    try:
        again = Translator.load(moved).translate("enn ens", "en_Latn", "aa_Latn", max_len=10)
        assert again.text == found[0].text
    finally:
        moved.rename(imported)


@pytest.fixture(scope="module")
def binarised(imported, words_data, tmp_path_factory):
    """Text in the pieces of the model, as fairseq-preprocess leaves it with the model's
    dictionary."""
    folder = tmp_path_factory.mktemp("binarised")
    spm = sentencepiece.SentencePieceProcessor(model_file=str(imported / "spm.model"))
    for split in ("train", "valid", "test"):
        for language in ("en", "aa"):
            own = "valid" if split == "train" else split
            lines = words_data / f"{own}.en-aa.{language}.txt"
            pieces = spm.encode(lines.read_text().splitlines(), out_type=str)
            text = "".join(" ".join(line) + "\n" for line in pieces)
            (folder / f"{split}.{language}_Latn").write_text(text)
    toy_task.run(
        *("fairseq-preprocess", "--source-lang", "en_Latn", "--target-lang", "aa_Latn"),
        *(f"--{split}pref={folder}/{split}" for split in ("train", "valid", "test")),
        *("--srcdict", imported / "dict.txt", "--tgtdict", imported / "dict.txt"),
        *("--destdir", folder / "data"),
    )
    shutil.copyfile(imported / "langs.txt", folder / "data" / "langs.txt")
    return folder / "data"


OPTIONS = (
    *("--arch", "smoe_transformer", "--smoe-strata", "5", "--encoder-moe-freq", "2"),
    *("--decoder-moe-freq", "3", "--moe-gate-bias", "--moe-eom", "0.2", "--encoder-langtok", "src"),
    *("--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--encoder-layers", "4"),
    *("--decoder-layers", "3", "--encoder-attention-heads", "4", "--decoder-attention-heads", "2"),
    *("--lang-pairs", "en_Latn-aa_Latn,aa_Latn-en_Latn"),
)


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model"])
def test_it_trains_on(flag, imported, binarised, tmp_path):
    checkpoint = imported / "checkpoint_best.pt"
    outcome = toy_task.train(
        *(binarised, tmp_path, flag, checkpoint, *OPTIONS),
        max_update=3,
        log_interval=1,
        lr=1e-4,
        warmup_updates=1,
        dropout=0,
    )
    losses = outcome.losses()
    assert len(losses) == 3 and losses[-1] < losses[0]
    before, after = (
        files.read(path)["model"] for path in (checkpoint, tmp_path / "checkpoint_last.pt")
    )
    for name, tensor in before.items():
        # three updates of the imported model, not of another
        assert torch.allclose(after[name], tensor, atol=1e-3)
    found = toy_task.generate(
        *(binarised, tmp_path / "checkpoint_last.pt", "en_Latn-aa_Latn"), max_len_b=10
    )
    assert len(found.sentences) == 60


def test_fairseq_generate_takes_it(imported, binarised):
    found = toy_task.generate(
        *(binarised, imported / "checkpoint_best.pt", "en_Latn-aa_Latn"),
        *("--remove-bpe", "sentencepiece", "--max-len-b", "10", "--beam", "5"),
    )
    lines = [found.sentences[i][1] for i in sorted(found.sentences)]
    translator = Translator.load(imported)
    sources = (binarised.parent / "test.en_Latn").read_text().splitlines()
    texts = [line.replace(" ", "").replace("▁", " ").strip() for line in sources]
    own = translator.translate(texts, "en_Latn", "aa_Latn", max_len=10)
    assert [each.text for each in own] == lines


def test_weights_in_several_files_and_of_older_kinds(saved, imported, tmp_path):
    expected = load_model(imported).models[0].state_dict()
    state = saved.model.state_dict()
    names = sorted(state)
    index = {}
    folder = tmp_path / "parts"
    shutil.copytree(saved.folder, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    for part, own in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{part}.bin"
        torch.save({name: state[name].clone() for name in own}, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    main(
        ["import-nllb", str(folder), "--to", str(tmp_path / "x"), "--directions", "aa_Latn-en_Latn"]
    )
    loaded = load_model(tmp_path / "x")
    assert loaded.directions == [("aa_Latn", "en_Latn")]
    found = loaded.models[0].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def change_json(folder, name, change):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


MISTAKES = {
    "config.json: no such file": lambda folder: (folder / "config.json").unlink(),
    "config.json: is damaged": lambda folder: (folder / "config.json").write_text("{"),
    "model_type m2m_100; expected nllb-moe": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(model_type="m2m_100")
    ),
    "second_expert_policy random; only all and sampling": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(second_expert_policy="random")
    ),
    "eos_token_id 7; only 2": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(eos_token_id=7)
    ),
    r"gates.0.weight: has the shape \(5, 32\) in the weights, and by config.json \(4, 32\)": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(num_experts=4))
    ),
    "router.classifier.bias: this tensor has no place": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(router_bias=False)
    ),
    "weights have no model.encoder.layers.4": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(encoder_layers=5)
    ),
    "weights have no model.encoder.layers.0.ffn.router": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(encoder_sparse_step=1)
    ),
    "has a token en_Latn with id 40, and the model's embedding 40 rows": lambda folder: change_json(
        folder, "config.json", lambda c: c.update(vocab_size=40)
    ),
    "tokenizer.json: no such file": lambda folder: (folder / "tokenizer.json").unlink(),
    "has no tokens of languages": lambda folder: change_json(
        folder, "tokenizer.json", lambda c: c.update(added_tokens=c["added_tokens"][:4])
    ),
    "has no sentencepiece.bpe.model": lambda folder: (folder / "sentencepiece.bpe.model").unlink(),
    "has none of model.safetensors, pytorch_model.bin": lambda folder: (
        folder / "model.safetensors"
    ).unlink(),
    "model.safetensors: cannot be read": lambda folder: (folder / "model.safetensors").write_bytes(
        b"0" * 99
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(message, saved, tmp_path):
    folder, target = tmp_path / "saved", tmp_path / "x"
    shutil.copytree(saved.folder, folder)
    MISTAKES[message](folder)
    with pytest.raises(SystemExit, match=message) as caught:
        main(["import-nllb", str(folder), "--to", str(target)])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_mistakes_in_options_are_told(saved, tmp_path):
    for words, message in (
        ([tmp_path / "none", "--to", tmp_path / "x"], "none: no such folder"),
        ([saved.folder, "--to", saved.folder], "--to .*: exists; give a new folder"),
        (
            [saved.folder, "--to", tmp_path / "x", "--directions", "en-aa"],
            "--directions en-aa: expected two of the model's languages .* aa_Latn-en_Latn",
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["import-nllb", *map(str, words)])
