"""Every option of fairseq's commands does what docs/fairseq-options.md says."""

import json
import random
import re
import sys
from fnmatch import fnmatch
from importlib import import_module

import pytest
import toy_task
from fairseq_options import PROGRAMS, Case, cases_of, outside, page

from fairseq_smoe.errors import OptionError

DIRECTION = "en-aa"
CLI = {"generate": "generate", "interactive": "interactive", "training": "train"}
SHORT = {"max_update": 6, "max_tokens": 300}


@pytest.fixture(scope="module")
def files(make_once, data, text):
    """Files that cases name."""

    def make(folder):
        import sentencepiece

        words = [line.split()[0] for line in (data / "dict.en.txt").read_text().splitlines()]
        rng = random.Random(1)
        vectors = "".join(
            f"{word} {' '.join(f'{rng.gauss(0, 1):.3f}' for _ in range(64))}\n" for word in words
        )
        (folder / "embeddings.txt").write_text(f"{len(words)} 64\n{vectors}")
        weights = {f"main:{direction}": 0.1 for direction in toy_task.DIRECTIONS[1:]}
        weights[f"main:{toy_task.DIRECTIONS[0]}"] = 0.7
        (folder / "weights.json").write_text(json.dumps(weights))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text / "train.en-aa.en"),
            model_prefix=str(folder / "spm"),
            vocab_size=20,
            hard_vocab_limit=False,
            minloglevel=2,
        )

    return make_once("option-files", make)


@pytest.fixture(scope="module")
def command(data, text, trained, files, tmp_path_factory):
    """``command(program, words)`` runs a command with further options."""

    def command(program, words, check=True):
        if program == "training":
            folder = tmp_path_factory.mktemp("run")
            return toy_task.train(
                data, folder, *toy_task.MODELS["smoe"], *words, check=check, **SHORT
            )
        checkpoint = trained("smoe")
        if program == "generate":
            return toy_task.generate(data, checkpoint, DIRECTION, *words, check=check)
        lines = (text / f"test.{DIRECTION}.en").read_text()
        more = ["--buffer-size", "100", *words]
        return toy_task.Translations.read(
            toy_task.run(
                "fairseq-interactive",
                data,
                *toy_task._translation_options(checkpoint, DIRECTION, more, {}),
                stdin=lines,
                check=check,
            )
        )

    return command


@pytest.fixture(scope="module")
def stock(command):
    """``stock(program)``: what a command without further options comes to."""
    found = {}

    def stock(program):
        if program not in found:
            found[program] = result(command(program, []))
        return found[program]

    return stock


def result(outcome):
    """What options may change: the translations, or the loss of the training."""
    if isinstance(outcome, toy_task.Translations):
        return {i: sentence for i, (_, sentence) in outcome.sentences.items()}
    return [record["train_loss"] for record in outcome.log("train")]


def check(case, outcome, expected):
    printed = outcome.stdout + outcome.stderr
    if case.effect != "any":
        assert result(outcome), outcome.tail()
        assert (result(outcome) == expected) == (case.effect == "same"), outcome.tail()
    if case.finds:
        assert re.search(case.finds, printed), outcome.tail()


def split(program):
    """``(cases that work, cases that are refused)``"""
    cases = cases_of(program)
    return [c for c in cases if not c.refused], [c for c in cases if c.refused]


# --------------------------------------------------------------------------------------
# the page


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_the_help_is_on_the_page(program, monkeypatch):
    groups, names = outside(program)
    covered = {case.option for case in cases_of(program)}
    known, missing = set(), []
    for group in parser_of(program, monkeypatch)._action_groups:
        for action in group._group_actions:
            options = set(action.option_strings)
            known |= options
            listed = any(fnmatch(option, name) for option in options for name in names)
            if options and group.title not in groups and not listed and not options & covered:
                missing.append(action.option_strings[0])
    assert not missing, f"add cases for {missing} to tests/options/cases.toml"
    assert covered <= known | {"--rdrop-alpha"}, "options that the command does not have"


def test_the_page_is_up_to_date():
    assert (toy_task.REPOSITORY / "docs/fairseq-options.md").read_text() == page(), (
        "python tests/options/fairseq_options.py > docs/fairseq-options.md"
    )


def parser_of(program, monkeypatch):
    """The parser of a command with this project's task, after it has parsed."""
    from fairseq import options

    import fairseq_smoe

    fairseq_smoe.register()
    parsers = []
    stock = options.parse_args_and_arch

    def parse(parser, *args, **kwargs):
        parsers.append(parser)
        stock(parser, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(options, "parse_args_and_arch", parse)
    with pytest.raises(KeyboardInterrupt):
        start(program, [], "data", monkeypatch)
    return parsers[0]


def start(program, words, data, monkeypatch):
    """Start a command in this process."""
    import fairseq_smoe

    fairseq_smoe.register()
    module = import_module(f"fairseq_cli.{CLI[program]}")
    if program == "training":
        command = toy_task.train_command(data, "unused", *words)
    else:
        command = toy_task._translation_options("none.pt", DIRECTION, words, {})
        command = [f"fairseq-{program}", str(data), *command]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    module.cli_main()


# --------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("program", PROGRAMS)
def test_refused_options_are_named(program, data, text, files, monkeypatch, capsys):
    """Before anything is loaded, by a line that names the option."""
    folders = {"data": data, "text": text, "files": files}
    for case in split(program)[1]:
        if case.late:
            continue
        try:
            start(program, case.words(**folders), data, monkeypatch)
        except OptionError as error:
            message = str(error)
        except SystemExit:  # argparse
            message = capsys.readouterr().err.splitlines()[-1]
            message = message[message.index("--") :]
        assert case.option in message, (str(case), message)
        assert "\n" not in message


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.slow
def test_refused_commands(program, command, data, text, files):
    """The same as users see it; and what is found out only after loading."""
    wrong = []
    for case in split(program)[1]:
        outcome = command(program, case.words(data=data, text=text, files=files), check=False)
        last = outcome.stderr.splitlines()[-1]
        if outcome.returncode == 0 or "error: " not in last or "--" not in last:
            wrong.append((str(case), last))
    assert not wrong


# --------------------------------------------------------------------------------------
# what works


@pytest.mark.parametrize("program", PROGRAMS)
def test_options_that_change_nothing_together(program, command, stock, data, text, files):
    words, given = [], set()
    for case in split(program)[0]:
        if case.effect == "same" and not case.alone and case.option not in given:
            given.add(case.option)
            words += case.words(data=data, text=text, files=files)
    outcome = command(program, words)
    check(Case("all"), outcome, stock(program))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.slow
def test_options_that_work(program, command, stock, data, text, files):
    wrong = []
    for case in split(program)[0]:
        try:
            outcome = command(program, case.words(data=data, text=text, files=files))
            check(case, outcome, stock(program))
        except AssertionError as error:
            wrong.append((str(case), str(error)))
    assert not wrong, "\n".join(f"{case}: {error}" for case, error in wrong)
