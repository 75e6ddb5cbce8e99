"""The plugin in a process that trains something else with fairseq, whatever was imported first."""

import re
import subprocess
import sys

import pytest
import toy_task

# what is registered when; words for train.cli_main in lines of standard input, then for
# generate.cli_main in the last
PROGRAM = """
import logging
import shlex
import sys
logging.basicConfig(level="INFO", format="| %(name)s | %(message)s")  # else the first import does
{first}
from fairseq_cli import generate, train
{then}
*trainings, translation = sys.stdin.read().splitlines()
for words in trainings:
    sys.argv[1:] = shlex.split(words)
    train.cli_main()
sys.argv[1:] = shlex.split(translation)
generate.cli_main()
"""
REGISTER = "import fairseq, fairseq_smoe; fairseq_smoe.register()"
ORDERS = {
    "without": {"first": "", "then": ""},
    "before": {"first": REGISTER, "then": ""},
    "after": {"first": "", "then": REGISTER},
}
TASKS = {
    "translation": ["--task", "translation", "--source-lang", "en", "--target-lang", "aa"],
    "translation_multi_simple_epoch": [
        *("--task", "translation_multi_simple_epoch", "--langs", "en,aa,bb"),
        *("--encoder-langtok", "tgt", "--decoder-langtok"),
    ],
}


def words_for_training(data, folder, task, arch, max_update):
    words = [
        *(data, *TASKS[task], "--arch", arch, "--optimizer", "adam", "--lr", "1e-3", "--cpu"),
        *("--max-tokens", "500", "--max-update", max_update, "--save-dir", folder),
        *("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", "1"),
        *("--num-workers", "0", "--seed", "3", "--encoder-embed-dim", "16"),
        *("--decoder-embed-dim", "16", "--encoder-layers", "1", "--decoder-layers", "1"),
    ]
    if task != "translation":
        words += ["--lang-pairs", "en-aa,bb-en"]
    if arch == "transformer":
        return [*words, "--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16"]
    return [*words, "--encoder-hidden-size", "16", "--decoder-hidden-size", "16"]


def words_for_translation(data, folder, task):
    words = [data, *TASKS[task], "--path", folder / "checkpoint_last.pt", "--cpu", "--beam", "2"]
    if task != "translation":
        words += ["--lang-pairs", "en-aa,bb-en", "--source-lang", "en", "--target-lang", "aa"]
    return [*words, "--max-tokens", "500"]


def through_python(order, data, folder, task, arch):
    """Train, go on, and translate, in one process."""
    commands = [
        words_for_training(data, folder, task, arch, max_update=4),
        words_for_training(data, folder, task, arch, max_update=6),
        words_for_translation(data, folder, task),
    ]
    environment = toy_task.environment()
    if order == "without":  # else a stock fairseq cannot read its own checkpoints on this torch
        environment["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(**ORDERS[order])],
        env=environment,
        cwd=toy_task.REPOSITORY,
        input="\n".join(" ".join(map(str, command)) for command in commands),
        capture_output=True,
        text=True,
    )
    outcome = toy_task.Outcome(["python"], done.returncode, done.stdout, done.stderr)
    assert done.returncode == 0, outcome.tail()
    return results([outcome], outcome.stdout)


def through_commands(data, folder, task, arch):
    plugin = ["--user-dir", "fairseq_smoe"]
    trained = [
        toy_task.run(
            "fairseq-train", *words_for_training(data, folder, task, arch, max_update), *plugin
        )
        for max_update in (4, 6)
    ]
    translation = words_for_translation(data, folder, task)
    return results(trained, toy_task.run("fairseq-generate", *translation, *plugin).stdout)


def results(trained, translated):
    """Losses of the updates and validations, and lines of translations."""
    logged = [
        (kind, record.get("num_updates", record.get("valid_num_updates")), record[loss])
        for outcome in trained
        for kind, loss in (("train_inner", "loss"), ("valid", "valid_loss"))
        for record in outcome.log(kind)
    ]
    hypotheses = re.findall(r"^[HP]-\d+\t.*$", translated, re.M)
    # a stock fairseq leaves out the last sentences, so that batches are multiples of 8
    assert len(hypotheses) == 2 * (toy_task.SPLIT_SIZES["test"] // 8 * 8)
    assert {update for kind, update, _ in logged if kind == "train_inner"} == set(range(1, 7))
    return sorted(logged), hypotheses


def some(task, arch, *marks):
    return pytest.param(task, arch, id=f"{task}-{arch}", marks=marks)


@pytest.mark.parametrize(
    "task, arch",
    [
        some("translation", "transformer"),
        some("translation", "lstm", pytest.mark.slow),
        some("translation_multi_simple_epoch", "transformer", pytest.mark.slow),
        some("translation_multi_simple_epoch", "lstm", pytest.mark.slow),
    ],
)
def test_stock_models_train_resume_and_translate_as_without_it(task, arch, data, tmp_path):
    """Bit for bit: the losses, and the scores of translations."""
    expected = through_python("without", data, tmp_path / "without", task, arch)
    found = [through_python(o, data, tmp_path / o, task, arch) for o in ("before", "after")]
    if (task, arch) != ("translation", "transformer"):  # the others take longer anyway
        found.append(through_commands(data, tmp_path / "commands", task, arch))
    assert found == [expected] * len(found)
