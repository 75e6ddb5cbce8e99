"""A checkpoint knows its data: what contradicts it is refused, what is left out comes from it."""

import shutil
from argparse import Namespace

import pytest
import torch
import toy_task
from fairseq.data import Dictionary
from hypothesis import given
from hypothesis import strategies as st
from toy_task import generate, interactive, run, train

from fairseq_smoe.checkpoints.data_record import DataRecord
from fairseq_smoe.errors import CheckpointError
from fairseq_smoe.translation import language_options

SMOE = toy_task.MODELS["smoe"]
OTHER_TOKENS = ["--encoder-langtok", "src", "--no-decoder-langtok"]


@pytest.fixture(scope="module")
def other_data(make_once, data):
    """The data folder with a dictionary of the same size in another order."""

    def make(folder):
        shutil.copytree(data, folder, dirs_exist_ok=True)
        for path in folder.glob("dict.*.txt"):
            lines = path.read_text().splitlines(keepends=True)
            lines[5], lines[7] = lines[7], lines[5]
            path.write_text("".join(lines))

    return make_once("other-data", make)


@pytest.fixture(scope="module")
def last(short_run, tmp_path_factory):
    """A copy of the short training's folder, to resume in."""
    return shutil.copytree(short_run, tmp_path_factory.mktemp("record") / "run")


def refusal(outcome):
    """The only line that a command printed about an error."""
    assert outcome.returncode == 1, outcome.tail()
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in outcome.stderr, outcome.tail()
    return errors[0]


def validate(data, checkpoint, *more, check=True):
    return run(
        *("fairseq-validate", data, "--user-dir", "fairseq_smoe", "--task", "smoe_translation"),
        *("--path", checkpoint, "--max-tokens", 2000, "--cpu", *more),
        check=check,
    )


def resume(data, folder, *more, check=False, **options):
    options = {"max_update": 32, **options}
    return train(data, folder, *SMOE, *more, check=check, **options)


def ours(command, data, folder):
    checkpoint = ("--checkpoint", folder / "checkpoint_last.pt", "--run", folder)
    return run("python", "-m", "fairseq_smoe", command, *checkpoint, "--data", data, check=False)


COMMANDS = {
    "resume": lambda data, last: resume(data, last),
    "fine-tune": lambda data, last: resume(
        data, last / "new", finetune_from_model=last / "checkpoint_last.pt"
    ),
    "validate": lambda data, last: validate(data, last / "checkpoint_last.pt", check=False),
    "generate": lambda data, last: generate(data, last / "checkpoint_last.pt", check=False),
    "interactive": lambda data, last: run(
        *("fairseq-interactive", data, "--user-dir", "fairseq_smoe", "--task", "smoe_translation"),
        *("--path", last / "checkpoint_last.pt", "-s", "en", "-t", "aa", "--cpu"),
        stdin="en1\n",
        check=False,
    ),
    "evaluate": lambda data, last: ours("evaluate", data, last),
    "analyse": lambda data, last: ours("analyse", data, last),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_another_dictionary_of_the_same_size_is_refused(command, other_data, last):
    before = sorted(last.rglob("*"))
    message = refusal(COMMANDS[command](other_data, last))
    assert str(other_data) in message and "checkpoint_last.pt" in message
    assert "entry 9 is 'en7' here, 'en5' there" in message  # 4 entries of fairseq's come first
    written = set(last.rglob("*")) - set(before)
    assert not any(path.suffix in (".pt", ".txt", ".csv") for path in written), written


def test_a_longer_dictionary_is_refused_with_the_same_line(data, last, tmp_path):
    longer = shutil.copytree(data, tmp_path / "longer")
    for path in longer.glob("dict.*.txt"):
        path.write_text(path.read_text() + "more 1\n")
    for command in ("resume", "generate"):
        message = refusal(COMMANDS[command](longer, last))
        assert "(31 entries)" in message and "(32 entries)" in message
        assert "entry 28 is 'more' here, '__en__' there" in message


def test_options_that_contradict_are_refused_one_by_one(data, last):
    checkpoint = last / "checkpoint_last.pt"
    message = refusal(resume(data, last, "--encoder-langtok", "src"))
    assert "--encoder-langtok src: " in message and "was trained with tgt" in message
    message = refusal(generate(data, checkpoint, "en-aa", "--no-decoder-langtok", check=False))
    assert "--decoder-langtok off: " in message and "was trained with on" in message
    message = refusal(validate(data, checkpoint, "--langs", "aa,en,bb", check=False))
    assert "--langs aa,en,bb: " in message and "was trained with en,aa,bb" in message


def test_what_is_left_out_comes_from_the_checkpoint(data, tmp_path):
    """Language tokens, and the list of languages where the folder has none."""
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / "langs.txt").unlink()
    langs = ("--langs", "bb,en,aa")
    train(folder, tmp_path / "run", *SMOE, *OTHER_TOKENS, *langs, max_update=30)
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    resumed = resume(folder, tmp_path / "run", check=True)
    assert "Loaded checkpoint" in resumed.stdout + resumed.stderr
    left_out = generate(folder, checkpoint)
    said = generate(folder, checkpoint, "en-aa", *OTHER_TOKENS, *langs)
    assert left_out.sentences == said.sentences and len(said.sentences) == 60
    lines = ["en1 en2", "en7 en3 en3"]
    assert interactive(folder, checkpoint, lines).sentences
    # as validated at the end of the training, which had no options left out
    (valid,) = resumed.log("valid")[-1:]
    validated = validate(folder, checkpoint)
    assert f"nll_loss {valid['valid_nll_loss']:g} " in validated.stdout + validated.stderr


def test_a_checkpoint_without_a_record_is_used_with_a_warning(data, other_data, last, tmp_path):
    """As written by earlier versions. Another size is still refused in one line."""
    old = tmp_path / "checkpoint_last.pt"
    state = torch.load(last / "checkpoint_last.pt", weights_only=False)
    state["task_state"] = {}
    torch.save(state, old)
    for outcome in (
        generate(other_data, old),
        resume(other_data, tmp_path, check=True, max_update=31),
    ):
        assert "does not record its dictionary" in outcome.stdout + outcome.stderr
    torch.save(state, old)
    longer = shutil.copytree(data, tmp_path / "longer")
    for path in longer.glob("dict.*.txt"):
        path.write_text(path.read_text() + "more 1\n")
    for outcome in (generate(longer, old, check=False), resume(longer, tmp_path)):
        message = refusal(outcome)
        assert "make 32 entries, those of the checkpoint 31" in message


def test_checkpoints_of_different_data_are_not_averaged(data, last, tmp_path):
    one, other = (tmp_path / f"checkpoint{n}.pt" for n in (1, 2))
    shutil.copy(last / "checkpoint_last.pt", one)
    state = torch.load(one, weights_only=False)
    record = state["task_state"]["data_record"]
    entries = record["dictionaries"]["en"].replace("en5\n", "en55\n")
    record["dictionaries"] = dict.fromkeys(record["dictionaries"], entries)
    torch.save(state, other)
    average = ("python", "-m", "fairseq_smoe", "checkpoint", "average")
    assert run(*average, one, one, "--to", tmp_path / "same.pt").returncode == 0
    assert "'en55'" in refusal(run(*average, one, other, "--to", tmp_path / "mean.pt", check=False))
    assert not (tmp_path / "mean.pt").exists()


# --------------------------------------------------------------------------------------
# the record alone


def record(words, languages=("en", "de"), **options):
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word)
    args = Namespace(**{**language_options.DEFAULTS, "langtoks": {"main": ("tgt", "tgt")}})
    vars(args).update(options)
    return language_options.record_of(args, languages, dict.fromkeys(languages, dictionary))


WORDS = st.lists(st.text("ab\u2028\x85é ", min_size=1), unique=True, max_size=6)


@given(WORDS, WORDS)
def test_the_first_difference_is_named(ours, theirs):
    saved = DataRecord.in_task_state(record(theirs).to_task_state())
    places = [i for i in range(7) if ours[i : i + 1] != theirs[i : i + 1]]
    if not places:
        saved.check(record(ours), "checkpoint", "data")
        return
    with pytest.raises(CheckpointError, match=rf"entry {places[0] + 4} is "):
        saved.check(record(ours), "checkpoint", "data")


@given(WORDS)
def test_a_language_that_was_not_trained_needs_the_same_dictionary(words):
    saved = record(words)
    same, other = (
        DataRecord(record(entries, ["aa"]).dictionaries, saved.languages, saved.options)
        for entries in (words, [*words, "more"])
    )
    saved.check(same, "checkpoint", "data")
    with pytest.raises(CheckpointError, match="dictionary of aa"):
        saved.check(other, "checkpoint", "data")


OPTIONS = st.fixed_dictionaries(
    {
        "encoder_langtok": st.sampled_from(["src", "tgt"]),
        "decoder_langtok": st.booleans(),
        "lang_tok_style": st.sampled_from(["multilingual", "mbart"]),
        "lang_tok_replacing_bos_eos": st.booleans(),
        "enable_lang_ids": st.booleans(),
    }
)


@given(OPTIONS, st.sets(st.sampled_from(list(language_options.DEFAULTS))), st.booleans())
def test_any_option_can_be_left_out(tmp_path_factory, given_options, left_out, old):
    """Complete again, the options are those of the training; with or without a record."""
    options = {**language_options.DEFAULTS, **given_options}
    trained = Namespace(
        **options, langs=["b", "a"], lang_dict=None, langtoks=None, data=".", restore_file=None
    )
    trained.langtoks = {
        "main": (trained.encoder_langtok, "tgt" if trained.decoder_langtok else None)
    }
    dictionaries = {"a": Dictionary(), "b": Dictionary()}
    saved = language_options.record_of(trained, trained.langs, dictionaries)
    path = tmp_path_factory.getbasetemp() / "with-options.pt"
    state = {} if old else saved.to_task_state()
    torch.save({"model": {}, "cfg": {"task": trained}, "task_state": state}, path)
    args = Namespace(**{name: None if name in left_out else v for name, v in options.items()})
    args.langs = args.lang_dict = args.langtoks = None
    args.source_dict = args.target_dict = args.fixed_dictionary = None
    args.path = str(path)
    assert language_options.fill_in(args) == str(path)
    if args.langtoks is None:  # then fairseq makes them of the other two
        args.langtoks = trained.langtoks
    now = language_options.record_of(args, args.langs, dictionaries)
    saved.check(now, "checkpoint", "data")
