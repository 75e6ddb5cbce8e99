"""Adding languages to a trained model."""

import random
import shutil
import subprocess

import pytest
import torch
import toy_task
from fairseq.data import Dictionary

from fairseq_smoe import Translator
from fairseq_smoe.__main__ import main

pytestmark = pytest.mark.xdist_group("extend")  # one worker makes what all of them need
OLD = ("en", "aa", "bb")


def write_text(folder, lang):
    """Text of en and a new language, which says ``lang3`` for ``en3``, in the same order."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(lang)
    for split, lines in (("train", 400), ("valid", 20), ("test", 20)):
        sentences = [draw.choices(range(8), k=draw.randint(1, 6)) for _ in range(lines)]
        for language in ("en", lang):
            text = "".join(" ".join(f"{language}{n}" for n in s) + "\n" for s in sentences)
            (folder / f"{split}.en-{lang}.{language}").write_text(text)
    return folder


@pytest.fixture(scope="module")
def new_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new-text")
    for lang in ("cc", "dd"):
        write_text(folder, lang)
    return folder


def extend(checkpoint, text, pairs, to, *more):
    words = ["--with-text", text, "--pairs", pairs, "--to", to, "--new-pieces", 14]
    words += ["--clean", "none", "--workers", 1, *more]
    main(["extend", str(checkpoint), *map(str, words)])
    return to / "checkpoint.pt"


@pytest.fixture(scope="module")
def extended(spoken, new_text, tmp_path_factory):
    best = spoken / "checkpoints" / "checkpoint_best.pt"
    return extend(best, new_text, "en-cc", tmp_path_factory.mktemp("extended") / "new")


def weights(path):
    state = torch.load(path, weights_only=False)
    options = state["cfg"]["model"]
    return state["model"], options if isinstance(options, dict) else vars(options)


def symbols(folder):
    return Dictionary.load(str(folder / "dict.txt")).symbols


@pytest.mark.parametrize("direction", toy_task.DIRECTIONS)
def test_old_directions_are_translated_as_before(direction, spoken, extended, generated):
    own, (source, target) = generated[direction], direction.split("-")
    texts = [*own.sources, "strange <unk> signs: ß cc3 \u2581 \u2603"]
    before, after = (
        Translator.load(path).translate(texts, source, target, n_best=3, with_scores=True)
        for path in (spoken, extended)
    )
    assert [r.text for r in after[:-1]] == own.lines
    for ours, theirs in zip(after, before, strict=True):
        for new, old in zip(ours.hypotheses, theirs.hypotheses, strict=True):
            assert new.pieces == old.pieces
            assert new.score == pytest.approx(old.score, abs=1e-5)


def test_fairseq_generate_translates_old_text_of_the_new_folder(extended, generated):
    own = generated["en-aa"]
    options = ("--remove-bpe", "sentencepiece", "--beam", "5")
    outcome = toy_task.generate(extended.parent / "data", extended, "en-aa", *options)
    assert [outcome.sentences[i][1] for i in sorted(outcome.sentences)] == own.lines


def test_what_was_there_keeps_its_place(spoken_data, extended):
    data = extended.parent / "data"
    before, after = symbols(spoken_data), symbols(data)
    assert after[: len(before)] == before and after[-1] == "__cc__" and len(after) > len(before) + 1
    assert (data / "spm.model").read_bytes() == (spoken_data / "spm.model").read_bytes()
    assert (data / "langs.txt").read_text().split() == ["aa", "bb", "en", "cc"]
    report = (data / "report.md").read_text()
    assert f"The vocabulary of {spoken_data}; new languages have a SentencePiece model" in report
    for name in ("train.en-aa.aa.bin", "test.en-bb.en.txt"):  # to be mixed with the new text
        assert (data / name).read_bytes() == (spoken_data / name).read_bytes()
    tensors, options = weights(extended)
    assert options["untrained_tokens"] == len(after) - len(before)
    embeddings = [tensors[f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder")]
    assert len({rows.untyped_storage().data_ptr() for rows in embeddings}) == 1
    assert len(embeddings[0]) == len(after)


def test_new_tokens_begin_as_what_spells_them(spoken_data, extended):
    before, after = symbols(spoken_data), symbols(extended.parent / "data")
    rows = weights(extended)[0]["encoder.embed_tokens.weight"]
    tokens = [before.index(f"__{lang}__") for lang in OLD]
    torch.testing.assert_close(rows[-1], rows[tokens].mean(0))
    assert all(rows[len(before) :].norm(dim=1) > 0)
    mean = rows[4 : len(before)].mean(0)
    spelt = [i for i in range(len(before), len(after) - 1) if not torch.allclose(rows[i], mean)]
    assert spelt  # of parts that the old vocabulary knows


def test_twice_is_once_by_both(spoken, extended, new_text, tmp_path):
    best = spoken / "checkpoints" / "checkpoint_best.pt"
    twice = extend(extended, new_text, "en-dd", tmp_path / "twice")
    once = extend(best, new_text, "en-cc,en-dd", tmp_path / "once")
    (ours, options), (theirs, others) = weights(twice), weights(once)
    assert ours.keys() == theirs.keys()
    assert options["untrained_tokens"] == others["untrained_tokens"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for path in sorted((once.parent / "data").glob("*.*")):
        if path.suffix in (".bin", ".idx", ".model") or path.name.startswith("dict."):
            assert path.read_bytes() == (twice.parent / "data" / path.name).read_bytes(), path


def test_training_goes_on_with_old_and_new_text(extended, tmp_path):
    data = extended.parent / "data"
    toy_task.train(
        *(data, tmp_path, *toy_task.MODELS["smoe"], "--finetune-from-model", extended),
        **{"lang_pairs": "en-cc,cc-en,en-bb,bb-en", **toy_task.LONG_ENOUGH, "max_update": 150},
    )
    checkpoint = tmp_path / "checkpoint_last.pt"
    tensors, options = weights(checkpoint)
    assert options["untrained_tokens"] == 0
    translator = Translator.load(checkpoint)
    assert ("en", "cc") in translator.directions
    found = translator.translate("en1 en2 en3", "en", "cc").text
    assert "cc" in found and translator.translate("cc5", "cc", "en").text.startswith("en")
    main(["pack", str(checkpoint), "--to", str(tmp_path / "packed")])
    assert (tmp_path / "packed" / "spm.cc.model").is_file()
    with pytest.raises(SystemExit, match="cc has a SentencePiece model of its own"):
        words = ["--format", "transformers", "--to", str(tmp_path / "exported")]
        main(["export", str(checkpoint), *words])
    packed = Translator.load(tmp_path / "packed")
    assert packed.translate("en1 en2 en3", "en", "cc").text == found
    assert packed.translate("cc1 cc7", "cc", "en") == translator.translate("cc1 cc7", "cc", "en")


def test_an_interrupted_call_goes_on(spoken, new_text, extended, tmp_path):
    """Killed while it prepares text; the same command then comes to the same result."""
    words = ("--with-text", new_text, "--pairs", "en-cc", "--to", tmp_path / "new")
    words += ("--new-pieces", 14, "--clean", "none", "--workers", 1)
    command = ["python", "-m", "fairseq_smoe", "extend", spoken, *words]
    process = subprocess.Popen(
        list(map(str, command)), cwd=toy_task.REPOSITORY, env=toy_task.environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("encode"):
            break
    process.kill()
    process.communicate()
    assert not (tmp_path / "new" / "checkpoint.pt").exists()
    again = extend(spoken, new_text, "en-cc", tmp_path / "new")
    ours, theirs = weights(again)[0], weights(extended)[0]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_mistakes_are_told(spoken, spoken_data, extended, new_text, data, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for split in ("train", "valid", "test"):
        for lang in ("en", "cc"):
            (empty / f"{split}.en-cc.{lang}").write_text("")
    other = shutil.copytree(spoken_data, tmp_path / "other")
    lines = (other / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join(lines[1:2] + lines[:1] + lines[2:]) + "\n")
    for words, message in (
        ([spoken, new_text, "en-aa", tmp_path / "a"], "--pairs en-aa: .* knows both languages"),
        ([spoken, empty, "en-cc", tmp_path / "b"], "no training text of en-cc"),
        ([spoken, new_text, "en-cc", extended.parent], "has a checkpoint.pt; choose another"),
        ([spoken, new_text, "en-cc", tmp_path / "c", "--like", "zz"], "--like zz: the model knows"),
        ([spoken, new_text, "en-cc", tmp_path / "d", "--data", data], "--data .*has no dict.txt"),
        ([extended, new_text, "en-cc", tmp_path / "e"], "--pairs en-cc: .* knows both languages"),
        ([spoken, new_text, "en-cc", tmp_path / "f", "--new-pieces", "-1"], "expected 0 or more"),
        ([spoken, new_text, "en-dd", tmp_path / "g", "--data", other], "is another than that"),
        ([tmp_path / "none.pt", new_text, "en-cc", tmp_path / "h"], "none.pt"),
    ):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            extend(*words)
    for name in "abcdefgh":
        assert not (tmp_path / name / "checkpoint.pt").exists()


def test_what_is_not_trained_is_not_exported(extended, with_experts, tmp_path):
    for checkpoint in (extended, with_experts):
        words = [str(checkpoint), "--format", "transformers", "--to", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match="what is new has not been trained; train it first"):
            main(["export", *words])


def test_a_vocabulary_can_be_kept(spoken, spoken_data, new_text, tmp_path):
    path = extend(spoken, new_text, "en-dd", tmp_path / "kept", "--new-pieces", 0, "--like", "bb")
    before, after = symbols(spoken_data), symbols(path.parent / "data")
    assert after == [*before, "__dd__"] and not (path.parent / "data" / "spm.dd.model").exists()
    rows = weights(path)[0]["encoder.embed_tokens.weight"]
    assert torch.equal(rows[-1], rows[before.index("__bb__")])


@pytest.fixture(scope="module")
def with_experts(spoken, tmp_path_factory):
    """Three more experts in the second stratum of 2-2-2-2, one in the last."""
    folder = tmp_path_factory.mktemp("experts") / "new"
    main(["extend", str(spoken), "--add-experts", "2:3,4:1", "--to", str(folder)])
    return folder / "checkpoint.pt"


def test_more_experts_translate_as_before(spoken, with_experts, generated):
    for direction in ("en-aa", "bb-en"):
        own = generated[direction]
        before, after = (
            Translator.load(path).translate(own.sources, *direction.split("-"), with_scores=True)
            for path in (spoken, with_experts)
        )
        assert [r.text for r in after] == own.lines
        for new, old in zip(after, before, strict=True):
            assert new.hypotheses[0].score == pytest.approx(old.hypotheses[0].score, abs=1e-5)


def test_new_experts_begin_as_copies_at_the_ends_of_their_strata(spoken, with_experts):
    before = weights(spoken / "checkpoints" / "checkpoint_best.pt")[0]
    after, options = weights(with_experts)
    assert (options["smoe_strata"], options["untrained_experts"]) == ("2-5-2-3", "2:3,4:1")
    old = [0, 1, 2, 3, 7, 8, 9, 10]  # and 4, 5, 6 and 11 are new
    block = next(name for name in after if name.endswith("experts.fc1_weight"))[:-18]
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        ours, theirs = after[f"{block}experts.{name}"], before[f"{block}experts.{name}"]
        assert torch.equal(ours[old], theirs)
        copied = theirs[[2, 3, 2, 6]]
        assert not torch.equal(ours[[4, 5, 6, 11]], copied)  # noise
        torch.testing.assert_close(ours[[4, 5, 6, 11]], copied, rtol=0.1, atol=0.1)
    gates = [after[f"{block}gates.{i}.weight"] for i in range(4)]
    assert [len(gate) for gate in gates] == [12, 10, 5, 3]
    assert torch.equal(gates[1][[2, 3, 4]], before[f"{block}gates.1.weight"][[0, 1, 0]])


def test_training_opens_the_new_experts(with_experts, spoken_data, tmp_path):
    words = ("--smoe-strata", "2-5-2-3", "--finetune-from-model", with_experts)
    words += ("--train-only", "gates,experts")
    toy_task.train(spoken_data, tmp_path, *words, max_update=20, lr=1e-2)
    before, after = weights(with_experts)[0], weights(tmp_path / "checkpoint_last.pt")[0]
    name = next(name for name in after if name.endswith("experts.fc1_weight"))
    assert all((after[name] != before[name]).flatten(1).any(1)[[4, 5, 6, 11]])
    assert Translator.load(tmp_path / "checkpoint_last.pt").translate("en1", "en", "aa").text


def test_experts_twice_and_with_a_language(with_experts, new_text, tmp_path):
    words = ("--add-experts", "4:1")
    path = extend(with_experts, new_text, "en-cc", tmp_path / "both", *words)
    options = weights(path)[1]
    assert (options["smoe_strata"], options["untrained_experts"]) == ("2-5-2-4", "2:3,4:2")
    assert options["untrained_tokens"] > 0
    assert Translator.load(path).translate("en1 en2", "en", "aa").text


def test_mistakes_about_experts_are_told(spoken, trained, tmp_path):
    for checkpoint, words, message in (
        (spoken, ["--add-experts", "5:1"], "has the strata 2-2-2-2; give a stratum from 1 to 4"),
        (spoken, ["--add-experts", "two"], "--add-experts two: expected STRATUM:NUMBER"),
        (spoken, [], "--with-text: give text and --pairs"),
        (trained("dense"), ["--add-experts", "1:1"], "is a dense model"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["extend", str(checkpoint), *words, "--to", str(tmp_path / "x")])


def test_a_checkpoint_in_parts_is_extended_as_the_whole(spoken, with_experts, tmp_path):
    best = spoken / "checkpoints" / "checkpoint_best.pt"
    main(["checkpoint", "split", "--parts", "2", str(best), str(tmp_path / "split.pt")])
    words = ["--add-experts", "2:3,4:1", "--to", str(tmp_path / "new")]
    main(["extend", str(tmp_path / "split.pt"), *words])
    ours, theirs = weights(tmp_path / "new" / "checkpoint.pt")[0], weights(with_experts)[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_two_ranks_train_an_extended_model_on(with_experts, spoken_data, tmp_path):
    """Experts sharded over two processes: 2-5-2-3 has twelve."""
    command = toy_task.train_command(
        *(spoken_data, tmp_path, "--smoe-strata", "2-5-2-3", "--finetune-from-model", with_experts),
        *("--moe-expert-parallel-size", "2", "--train-only", "gates,experts"),
        max_update=6,
    )
    toy_task.run("torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", *command)
    main(["checkpoint", "merge", str(tmp_path / "checkpoint_last.pt"), str(tmp_path / "one.pt")])
    before, after = weights(with_experts)[0], weights(tmp_path / "one.pt")[0]
    name = next(name for name in after if name.endswith("experts.fc1_weight"))
    assert after[name].shape == before[name].shape and not torch.equal(after[name], before[name])
    norm = next(name for name in after if name.endswith("norms.0.weight"))
    assert torch.equal(after[norm], before[norm])
