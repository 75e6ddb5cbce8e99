"""Commands that start as forks of a server do and print what those do that Python starts itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import fork_server
import pytest
import toy_task

pytestmark = pytest.mark.slow  # whatever else starts a command tries it as well

PROBE = """
import atexit, json, os, random, signal, sys, threading
atexit.register(print, "at the end")
print(json.dumps({
    "name": __name__, "file": __file__, "main": sys.modules["__main__"].__file__,
    "arguments": sys.argv, "words": sys.orig_argv[-3:], "path": sys.path[0], "folder": os.getcwd(),
    "environment": dict(sorted(os.environ.items())), "input": sys.stdin.read(),
    "handlers": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "threads": [len(os.listdir("/proc/self/task")), threading.current_thread().name],
    "files": sorted(map(int, os.listdir("/proc/self/fd"))),
    "blocked": list(map(int, signal.pthread_sigmask(0, ()))),
    "terminals": [os.isatty(n) for n in range(3)], "buffered": sys.stdout.line_buffering,
    "plugin": "fairseq_smoe" in sys.modules,
}))
import torch
print(torch.get_num_threads(), torch.is_grad_enabled())
print("warning", file=sys.stderr)
"""

ENDS = {
    "nothing": "",
    "0": "sys.exit(0)",
    "none": "sys.exit()",
    "3": "sys.exit(3)",
    "300": "sys.exit(300)",
    "text": "sys.exit('error: a mistake')",
    "error": "def f(): raise ValueError('a mistake')\nf()",
    "hook": "sys.excepthook = lambda *error: print('hook', error[1])\n"
    "raise ValueError('a mistake')",
    "interrupted": "raise KeyboardInterrupt",
    "signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "ctrl-c": "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
    "abort": "os.abort()",
    "at-once": "os._exit(5)",
    "thread": "threading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()",
    "exec": "sys.stdout.flush(); os.execv('/bin/sh', ['sh', '-c', 'echo $0 $HOME; exit 4'])",
}


@pytest.fixture(params=fork_server.KINDS)
def kind(request):
    if fork_server.VARIABLE not in os.environ:
        pytest.skip("--own-processes")
    return request.param


@pytest.fixture
def both(tmp_path, kind):
    """``both(program)``: how it ends and what it prints, as a process and as a fork."""

    def run(program, *words, input=""):
        script = str(tmp_path / "script.py")
        (tmp_path / "script.py").write_text(program)
        settings = dict(env=toy_task.environment(COLUMNS="77"), cwd=str(tmp_path), input=input)
        command = [sys.executable, script, *words]
        process = fork_server.run_process(command, **settings)
        fork = fork_server.run_fork(kind, command, command[1:], **settings)
        return process, fork

    return run


def test_a_fork_finds_what_a_process_finds(both):
    process, fork = both(PROBE, "one", "two words", input="some\nlines\n")
    assert process.returncode == 0, process.stderr
    (expected, *others), (found, *their_others) = (
        done.stdout.splitlines() for done in (process, fork)
    )
    assert json.loads(found) == json.loads(expected)
    assert their_others == others and fork.stderr == process.stderr == "warning\n"


@pytest.mark.parametrize("end", ENDS)
def test_a_fork_ends_as_a_process_does(end, both):
    imports = "import atexit, os, signal, sys, threading, time; atexit.register(print, 'end')\n"
    process, fork = both(f"{imports}print('begin')\n{ENDS[end]}\n")
    assert (fork.returncode, fork.stdout) == (process.returncode, process.stdout)
    # in a traceback, the frames of the server stand above those of the program
    head, newline, tail = process.stderr.partition("\n")
    assert fork.stderr.startswith(head + newline) and fork.stderr.endswith(tail)


def test_random_numbers_are_others_every_time(both):
    numbers = "import random, numpy, torch\n"
    numbers += "print(random.random(), numpy.random.random(), torch.rand(1).item())"
    first, second = (both(numbers)[1].stdout.split() for _ in range(2))
    assert len(first) == 3 and not set(first) & set(second)


def test_what_takes_too_long_is_ended(tmp_path, kind):
    script = tmp_path / "script.py"
    script.write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(100)")
    command = [sys.executable, str(script)]
    settings = (kind, command, command[1:], toy_task.environment(), tmp_path)
    (tmp_path / "quick.py").write_text("")
    quick = [sys.executable, str(tmp_path / "quick.py")]
    # the server has imported its modules after that
    fork_server.run_fork(kind, quick, quick[1:], toy_task.environment(), tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run_fork(*settings, timeout=3)
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.01)


def test_a_fork_in_a_session_of_its_own(tmp_path, kind):
    """Is asked and ended as torchrun does with its ranks."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time; print(os.getsid(0) == os.getpid(), flush=True); time.sleep(100)"
    )
    command = [sys.executable, str(script)]
    with open(tmp_path / "output", "w+") as output, open(os.devnull) as nothing:
        settings = (command, command[1:], toy_task.environment(), tmp_path)
        with fork_server.Fork(kind, *settings, (nothing, output, output), True) as fork:
            while not (tmp_path / "output").read_text():
                assert fork.poll() is None
                time.sleep(0.01)
            os.killpg(fork.pid, signal.SIGTERM)
            assert fork.wait(timeout=10) == fork.poll() == -signal.SIGTERM
    assert (tmp_path / "output").read_text() == "True\n"


def test_ranks_of_torchrun_are_forks(tmp_path):
    if fork_server.VARIABLE not in os.environ:
        pytest.skip("--own-processes")
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").write_text(
        "import os; print('rank', os.environ['RANK'], open('/proc/self/cmdline').read())"
    )
    outcome = toy_task.run(
        *("torchrun", "--standalone", "--nproc_per_node", 2, "--no-python"),
        *("fairseq-train", tmp_path, "--user-dir", tmp_path / "plugin", "--arch", "none"),
        check=False,
    )
    ranks = re.findall(r"^rank (\d) .*fork_server.py", outcome.stdout, re.MULTILINE)
    assert sorted(ranks) == ["0", "1"] and outcome.returncode == 1, outcome.tail()
    assert re.search(r"exitcode +: 2 ", outcome.stderr), outcome.tail()


def test_processes_that_a_fork_starts_find_its_program(both):
    """multiprocessing imports it again."""
    process, fork = both(
        "import multiprocessing, os\n"
        "def work(): print(__name__, __file__, os.getcwd(), flush=True)\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    process.start(); process.join(); print(process.exitcode)\n"
    )
    assert process.stdout.endswith("\n0\n") and vars(fork) == vars(process)


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "LOGLEVEL", "LANG"])
def test_what_modules_may_read_needs_a_process_of_its_own(variable, monkeypatch):
    monkeypatch.setattr(fork_server, "run_fork", lambda *_: pytest.fail("a fork"))
    command = ["python", "-m", "fairseq_smoe", "path"]
    done = fork_server.run(command, toy_task.environment(**{variable: "1"}), toy_task.REPOSITORY)
    assert done.stdout == f"{toy_task.REPOSITORY / 'fairseq_smoe'}\n"


def test_commands_print_what_they_print_as_processes(data, short_run, tmp_path):
    """But for what imports print: fairseq's log, on the stream of each command, and errors."""
    generate = ["fairseq-generate", data]
    generate += toy_task._translation_options(short_run / "checkpoint_last.pt", "en-aa", (), {})
    for command in (
        generate,
        toy_task.train_command(data, tmp_path, "--smoe-strata", "4-x"),
        ["python", "-m", "fairseq_smoe", "checkpoint", "inspect", short_run / "checkpoint_last.pt"],
        ["python", "-m", "fairseq_smoe", "checkpoint"],
    ):
        process, fork = (
            toy_task.run(*command, check=False, own_process=own) for own in (True, False)
        )
        assert process.returncode == fork.returncode
        for stream in ("stdout", "stderr"):
            expected, found = map(told, (getattr(process, stream), getattr(fork, stream)))
            assert found == expected, stream


def told(printed):
    """Lines without times and warnings, and what is printed as tensorboardX is not there."""
    lines = [re.sub(r"^[\d-]+ [\d:]+|\d+\.\d+s?", "", line) for line in printed.splitlines()]
    others = re.compile(r"Warning|^ |^$|tensorboardX|^See |^This|^Hydra|^Before|^The |^'config'")
    return [line for line in lines if not others.search(line)]
