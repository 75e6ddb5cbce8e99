"""The commands of docs/tutorial.md, and of docs/finetune.md after them, as a shell runs them."""

import re
import shlex
import subprocess
import time

import pytest
import toy_task
from prepared_folder import write_text

pytestmark = pytest.mark.slow

PLUGIN = '"$(python -m fairseq_smoe path)"'
SIZES = {
    "--encoder-layers 4 --decoder-layers 4": "--encoder-layers 2 --decoder-layers 2",
    "--encoder-embed-dim 256 --encoder-ffn-embed-dim 512": "--encoder-embed-dim 64",
    # an untrained model does not end its sentences
    "--eval-bleu ": "--eval-bleu --eval-bleu-sentences 1 ",
}
# what would take hours, or more text than there is here
SMALLER = {
    "tutorial.md": {
        **SIZES,
        "--vocab-size 8000": "--vocab-size 40",
        "--max-update 20000": "--max-update 2",
        "evaluate --run run": "evaluate --run run --max-len-b 10",
        "--input text": "--max-len 10 --input text",
        "--port 5000": "--port 0",
    },
    "finetune.md": {
        **SIZES,
        "--new-pieces 4000": "--new-pieces 30",
        "--max-update 10000": "--max-update 7",
        "--max-tokens 4000": "--max-tokens 200",  # several updates in an epoch
        "--save-interval-updates 200": "--save-interval-updates 1",
        "evaluate --run tuned": "evaluate --run tuned --max-len-b 10",
    },
}


def commands(page):
    text = (toy_task.REPOSITORY / "docs" / page).read_text()
    found = re.findall(r"(?:^    .+\n)+", text, re.M)
    for old, new in SMALLER[page].items():
        assert any(old in command for command in found), old
        found = [command.replace(old, new) for command in found]
    plugin = shlex.quote(str(toy_task.REPOSITORY / "fairseq_smoe"))
    return [command.replace(PLUGIN, plugin) for command in found]


def run(command, folder):
    begin = f"set -e; export PATH={shlex.quote(str(toy_task.COMMANDS))}:$PATH\n"
    toy_task.run("bash", "-c", begin + command, cwd=folder, own_process=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all commands of the tutorial but the last have been run."""
    folder = tmp_path_factory.mktemp("tutorial")
    write_text(folder / "text")
    found = commands("tutorial.md")
    assert len(found) == 6
    for command in found[:-1]:
        run(command, folder)
    return folder


def test_the_tutorial(folder):
    lines = (folder / "translated.de").read_text().splitlines()
    assert len(lines) == len((folder / "text" / "test.en-de.en").read_text().splitlines())
    environment = toy_task.environment(PYTHONPATH=str(toy_task.REPOSITORY))
    words = [toy_task.COMMANDS / "python", *commands("tutorial.md")[-1].split()[1:]]
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.PIPE) as serving:
        address = b""
        started = time.monotonic()
        while b"http://" not in address and time.monotonic() - started < 120:
            address = serving.stderr.readline()
        serving.terminate()
        try:
            assert serving.wait(60) == 0
        finally:
            serving.kill()
    assert address.startswith(b"http://127.0.0.1:")


def test_training_on(folder):
    write_text(folder / "domain", train_lines=100)
    write_text(folder / "more", pair="en-nl")
    for command in commands("finetune.md"):
        run(command, folder)
    assert (folder / "tuned" / "averaged.pt").is_file()
    assert (folder / "dutch" / "checkpoints" / "checkpoint_best.pt").is_file()
    assert (folder / "extended" / "data" / "train.en-de.de.bin").is_file()
