"""The commands of docs/tutorial.md, one after the other."""

import re
import shlex
import subprocess
import time

import pytest
import toy_task
from prepared_folder import write_text

TUTORIAL = toy_task.REPOSITORY / "docs" / "tutorial.md"
PLUGIN = '"$(python -m fairseq_smoe path)"'
# what would take hours, or more text than there is here
SMALLER = {
    "--vocab-size 8000": "--vocab-size 40",
    "--max-update 20000": "--max-update 2",
    # an untrained model does not end its sentences
    "--eval-bleu ": "--eval-bleu --eval-bleu-sentences 1 ",
    "evaluate --run run": "evaluate --run run --max-len-b 10",
    "--input text": "--max-len 10 --input text",
    "--port 5000": "--port 0",
    "--encoder-layers 4 --decoder-layers 4": "--encoder-layers 2 --decoder-layers 2",
    "--encoder-embed-dim 256 --encoder-ffn-embed-dim 512": "--encoder-embed-dim 64",
}


def commands():
    blocks = re.findall(r"(?:^    .+\n)+", TUTORIAL.read_text(), re.M)
    return [block.replace("\\\n", " ").strip() for block in blocks]


@pytest.mark.slow
def test_every_command_of_the_tutorial(tmp_path):
    write_text(tmp_path / "text")
    found = commands()
    assert len(found) == 6
    for old, new in SMALLER.items():
        assert sum(old in command for command in found) == 1
        found = [command.replace(old, new) for command in found]
    *found, serve = found
    for command in found:
        words = shlex.split(command.replace(PLUGIN, str(toy_task.REPOSITORY / "fairseq_smoe")))
        if words[0] == "python":
            words[0] = toy_task.COMMANDS / "python"
        toy_task.run(*words, cwd=tmp_path)
    lines = (tmp_path / "translated.de").read_text().splitlines()
    assert len(lines) == len((tmp_path / "text" / "test.en-de.en").read_text().splitlines())
    environment = toy_task.environment(PYTHONPATH=str(toy_task.REPOSITORY))
    words = [toy_task.COMMANDS / "python", *serve.split()[1:]]
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as serving:
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
