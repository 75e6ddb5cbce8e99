"""``python -m fairseq_smoe translate``: files of lines."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import toy_task

from fairseq_smoe.__main__ import main

pytestmark = pytest.mark.xdist_group("line files")  # one worker makes what all of them need
DIRECTION = ("--source", "en", "--target", "aa")


def translate(model, *words, stdin=b"", check=True):
    """The real command."""
    done = subprocess.run(
        command(model, *words), input=stdin, capture_output=True, env=environment()
    )
    if check:
        assert done.returncode == 0, done.stderr.decode()
    return done


def command(model, *words):
    return [sys.executable, "-m", "fairseq_smoe", "translate", str(model), *DIRECTION, *words]


def environment():
    return {**toy_task.environment(), "PYTHONPATH": str(toy_task.REPOSITORY)}


@pytest.fixture(scope="module")
def long_text(generated, tmp_path_factory):
    """``(file, translations)``"""
    own = generated["en-aa"]
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(f"{line}\n" for line in own.sources * 20))
    return path, own.lines * 20


def test_line_n_is_the_translation_of_line_n(spoken, generated):
    own = generated["en-aa"]
    first, second, *rest = own.sources
    text = "\ufeff" + f"{first}\r\n\n{second}\n \r\n" + "\n".join(rest)  # no newline at the end
    done = translate(spoken, "--processes", "1", "--chunk", "7", stdin=text.encode())
    expected = [own.lines[0], "", own.lines[1], "", *own.lines[2:]]
    assert done.stdout.decode().split("\n") == [*expected, ""]


def test_processes_write_the_same_file(spoken, long_text, tmp_path):
    path, lines = long_text
    for processes in ("1", "2"):
        output = tmp_path / processes
        words = ("--input", path, "--output", output, "--chunk", "50", "--processes", processes)
        translate(spoken, *map(str, words))
        assert output.read_text().splitlines() == lines
        assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_a_killed_command_goes_on_where_it_was(spoken, long_text, tmp_path):
    path, lines = long_text
    output = tmp_path / "output"
    part = tmp_path / "output.part"
    words = ("--input", path, "--output", output, "--chunk", "20", "--processes", "1")
    for sent in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = part.stat().st_size if part.exists() else 0
        with subprocess.Popen(
            command(spoken, *map(str, words)), env=environment(), stderr=subprocess.PIPE
        ) as running:
            while running.poll() is None and (not part.exists() or part.stat().st_size <= before):
                time.sleep(0.01)
            running.send_signal(sent)
            running.wait()
        assert not output.exists() and part.stat().st_size > before
    with open(part, "ab") as file:
        file.write(b"half a li")  # as of a computer that has lost power
    done = translate(spoken, *map(str, words))
    assert b"goes on behind line" in done.stderr
    assert output.read_text().splitlines() == lines


def test_another_command_does_not_go_on_with_it(spoken, generated, tmp_path):
    own = generated["en-aa"]
    path, output = tmp_path / "text", tmp_path / "output"
    path.write_text(own.sources[0])
    (tmp_path / "output.part").write_text("something else\n")
    (tmp_path / "output.part.json").write_text(json.dumps({"size": 4}))
    translate(spoken, "--input", str(path), "--output", str(output), "--processes", "1")
    assert output.read_text() == f"{own.lines[0]}\n"


def test_scores_and_several_translations(spoken, generated):
    own = generated["en-aa"]
    text = "".join(f"{line}\n" for line in own.sources).encode()
    words = ("--processes", "1", "--n-best", "2", "--with-scores")
    lines = translate(spoken, *words, stdin=text).stdout.decode().splitlines()
    assert [line.split("\t")[0] for line in lines] == own.lines
    assert {len(line.split("\t")) for line in lines} == {4}
    lines = translate(spoken, *words, "--format", "jsonl", stdin=text).stdout.decode().splitlines()
    for line, source, best, score in zip(lines, own.sources, own.lines, own.scores, strict=True):
        facts = json.loads(line)
        assert facts["source"] == source
        (first, second) = facts["translations"]
        assert first["text"] == best and first["score"] == pytest.approx(score, abs=2e-4)
        assert second["score"] <= first["score"]


def test_bytes_that_are_no_text_are_named_or_replaced(spoken, generated, tmp_path):
    sources, lines = (own[:4] for own in (generated["en-aa"].sources, generated["en-aa"].lines))
    path, output = tmp_path / "text", tmp_path / "output"
    good = [line.encode() for line in sources]
    path.write_bytes(b"\n".join([*good[:2], good[2].replace(b"en", b"\xffn"), good[3]]))
    words = ("--input", str(path), "--output", str(output), "--processes", "1", "--chunk", "1")
    done = translate(spoken, *words, check=False)
    assert done.returncode == 1
    (line,) = [x for x in done.stderr.decode().splitlines() if x.startswith("error")]
    assert f"{path}, line 3: is no UTF-8 text" in line and "--invalid-utf8 replace" in line
    assert (tmp_path / "output.part").read_text().splitlines() == lines[:2]  # nothing is lost
    translate(spoken, *words, "--invalid-utf8", "replace")
    found = output.read_text().splitlines()
    assert len(found) == 4 and [*found[:2], found[3]] == [*lines[:2], lines[3]]


@pytest.mark.slow
def test_a_worker_that_dies_is_told(spoken, long_text, tmp_path):
    path, lines = long_text
    output = tmp_path / "output"
    words = ("--input", path, "--output", output, "--chunk", "20", "--processes", "2")
    with subprocess.Popen(
        command(spoken, *map(str, words)), env=environment(), stderr=subprocess.PIPE
    ) as running:
        part = tmp_path / "output.part"
        while running.poll() is None and (not part.exists() or not part.stat().st_size):
            time.sleep(0.01)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(running.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        error = running.stderr.read().decode()
    assert running.returncode == 1 and "error: a process that translates has died" in error
    translate(spoken, *map(str, words))
    assert output.read_text().splitlines() == lines


def test_mistakes_are_told_in_one_line(spoken, tmp_path):
    (tmp_path / "there").touch()
    for words, message in (
        (["--input", tmp_path / "no"], "--input .*no: No such file"),
        (["--output", tmp_path / "there"], "--output .*there: exists"),
        (["--output", tmp_path / "no" / "file"], "--output .*file: No such file or directory"),
        (["--processes", "0"], "--processes 0: expected 1 or more"),
        (["--chunk", "0"], "--chunk 0: expected"),
        (["--processes", "2", "--device", "cuda"], "--processes 2 with --device cuda"),
        (["--beam", "0", "--processes", "1"], "beam 0: expected"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            main(["translate", str(spoken), *DIRECTION, *map(str, words)])
    with pytest.raises(SystemExit, match="error: target xx: the model knows"):
        main(["translate", str(spoken), "--source", "en", "--target", "xx", "--processes", "1"])


@pytest.mark.slow
def test_a_long_file_takes_no_more_memory(spoken, generated, tmp_path):
    """Peak memory of 60,000 lines is that of 6,000."""
    line = f"{generated['en-aa'].sources[0]}\n"
    peaks = []
    for number in (6_000, 60_000):
        path = tmp_path / str(number)
        path.write_text(line * number)
        words = ("--input", path, "--output", tmp_path / f"out{number}", "--beam", "1")
        words += ("--processes", "1")
        script = (
            "import resource, sys; from fairseq_smoe.__main__ import main; main(sys.argv[1:]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *command(spoken, *map(str, words))[3:]],
            capture_output=True,
            text=True,
            env=environment(),
            check=True,
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.03 * peaks[0]
