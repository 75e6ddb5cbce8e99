"""Commands as forks of processes that have imported what they import first, which takes seconds.

:func:`run` is ``subprocess.run`` for the commands of fairseq and of this project. A fork
differs from a process of the command's own in its beginning: its modules are imported already, so
that what imports print is missing, and its strings have the hash values of other forks. It differs
in its end: Python's own, without the last step that takes modules apart. It has its own memory,
process id, environment, files, signal handlers and random numbers, and runs the installed script,
as ``__main__``.

The ranks that ``torchrun`` starts are forks as well, if it is one itself.

A command is a process of its own all the same where its environment differs from that of the tests,
which modules may have read; where no server runs (``pytest --own-processes``); and for all of
``subprocess``, which the tests use where the process itself is what they test.

``fork_server.py SOCKETS`` is the server. It imports nothing before a command asks for it, and lasts
until its standard input is closed.
"""

import atexit
import contextlib
import gc
import json
import multiprocessing.process
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

# what is imported beforehand, the plugin never: fairseq's commands import it by --user-dir. fairseq
# sets up logging as it is imported, fairseq_cli.train before: each has a process of its own
TRAIN, TRANSLATE, TORCH = "train", "translate", "torch"
IMPORTS = {
    TRAIN: [
        "fairseq_cli.train",
        "torch._dynamo",  # for the optimizer, in every training
    ],
    TRANSLATE: [f"fairseq_cli.{n}" for n in ("generate", "interactive", "validate", "preprocess")],
    TORCH: [
        *("torch", "torch.distributed.run", "numpy", "sacrebleu", "sentencepiece"),
        *("hydra", "sklearn.metrics"),  # for fairseq, which some of them import
    ],
}
KINDS = tuple(IMPORTS)
SCRIPTS = {
    "fairseq-train": TRAIN,
    "fairseq-generate": TRANSLATE,
    "fairseq-interactive": TRANSLATE,
    "fairseq-validate": TRANSLATE,
    "fairseq-preprocess": TRANSLATE,
    "torchrun": TORCH,
}
COMMANDS = Path(sys.executable).parent
EXACT_LOGS = Path(__file__).with_name("exact_logs.py")
INTERRUPTED = Path(__file__).with_name("interrupted.py")
VARIABLE = "FORK_SERVER"  # its folder, in the environment of the tests
# read when they are used, or set by sklearn, and by torch as it counts FLOPs
OTHERS = ("PYTEST_", "_PYTEST_", VARIABLE, "COLUMNS", "LINES", "KMP_", "TORCHINDUCTOR_")


# --------------------------------------------------------------------------------------
# of the tests


@contextlib.contextmanager
def serving(environment):
    """A server for this process and those it starts."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "environment").write_text(json.dumps(_compared(environment)))
        with contextlib.ExitStack() as listening:
            # before it is there, so that nobody has to wait for it
            listeners = [listening.enter_context(socket.socket(socket.AF_UNIX)) for _ in KINDS]
            for listener, kind in zip(listeners, KINDS):
                listener.bind(f"{folder}/{kind}")
                listener.listen()
            numbers = [listener.fileno() for listener in listeners]
            server = subprocess.Popen(
                [sys.executable, __file__, *map(str, numbers)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=listening.enter_context(open(f"{folder}/errors", "w")),
                pass_fds=numbers,
            )
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            server.stdin.close()
            server.wait()


def run(command, env, cwd, input="", timeout=None):
    """Run a command to its end; returns a ``subprocess.CompletedProcess`` with what it printed."""
    command = list(map(str, command))
    kind, program = _which(command)
    if kind is None or not _serves(env):
        return run_process(command, env, cwd, input, timeout)
    return run_fork(kind, command, program, env, cwd, input, timeout)


def run_process(command, env, cwd, input="", timeout=None):
    """The same, always in a process of its own."""
    return subprocess.run(
        command, env=env, cwd=cwd, input=input, capture_output=True, text=True, timeout=timeout
    )


def run_fork(kind, command, program, env, cwd, input="", timeout=None):
    """Run ``["-m", MODULE, *arguments]``, or ``[SCRIPT, *arguments]``, as ``python`` would."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3)]
        files[0].write(input)
        files[0].seek(0)
        fork = stack.enter_context(Fork(kind, command, program, env, cwd, files))
        code = fork.wait(timeout)  # left before that, the server kills the process
        for file in files:
            file.seek(0)
        return subprocess.CompletedProcess(command, code, files[1].read(), files[2].read())


class Fork:
    """A command that runs as a fork; like a ``subprocess.Popen``, as far as ``torchrun`` uses it.

    Args:
        kind: of server.
        command, program, env, cwd: see :func:`run_program`.
        files: its standard input, output and error.
        new_session: whether it leads a session, and so a group of processes.
    """

    def __init__(self, kind, command, program, env, cwd, files, new_session=False):
        request = {"program": program, "command": command, "env": env, "cwd": str(cwd)}
        self._kind, self._command, self._answer = kind, command, b""
        with tempfile.TemporaryFile("w+") as file:
            file.write(json.dumps(request | {"new_session": new_session}))
            file.seek(0)
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.connect(f"{os.environ[VARIABLE]}/{kind}")
            numbers = [each if isinstance(each, int) else each.fileno() for each in (file, *files)]
            socket.send_fds(self._connection, [b"."], numbers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._connection.close()

    @property
    def pid(self):
        return self._line(0, timeout=None)

    def wait(self, timeout=None):
        """The exit code, as in ``subprocess``."""
        return self._line(1, timeout)

    def poll(self):
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def _line(self, number, timeout):
        """A line of the server's answer: the process id, or the exit code."""
        self._connection.settimeout(timeout)
        while self._answer.count(b"\n") <= number:
            try:
                received = self._connection.recv(100)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self._command, timeout) from None
            except ConnectionResetError:
                received = b""
            if not received:
                errors = (Path(os.environ[VARIABLE]) / "errors").read_text()
                raise RuntimeError(f"the fork server for {self._kind} has died: {errors}")
            self._answer += received
        return int(self._answer.splitlines()[number])


def start_rank(args, env, stdout, stderr, start_new_session):
    """``subprocess.Popen`` for ``torchrun``."""
    command = list(args)
    kind, program = _which(command)
    if kind is None:
        return subprocess.Popen(
            command, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session
        )
    files = 0, stdout or 1, stderr or 2
    return Fork(kind, command, program, env, os.getcwd(), files, start_new_session)


def _which(command):
    """The kind of server for a command, and its program: see :func:`run_fork`."""
    name, *more = command
    if name in SCRIPTS:
        return SCRIPTS[name], [str(COMMANDS / name), *more]
    if name in ("python", str(COMMANDS / "python"), sys.executable):
        if more[:1] == ["-u"]:  # of the ranks
            more = more[1:]
        if more[:2] == ["-m", "fairseq_smoe"]:
            return TORCH, more
        if more[:1] == [str(EXACT_LOGS)]:
            return TRAIN if more[1] == "train" else TRANSLATE, more
        if more[:1] == [str(INTERRUPTED)]:
            return TRAIN, more
    return None, None


def _serves(env):
    if VARIABLE not in os.environ:
        return False
    known = json.loads((Path(os.environ[VARIABLE]) / "environment").read_text())
    return known == _compared(env)


def _compared(env):
    """Variables that modules may read when they are imported."""
    return {name: value for name, value in env.items() if not name.startswith(OTHERS)}


# --------------------------------------------------------------------------------------
# the server


def main(numbers):
    """Serve, in one process for every kind; returns in the forks, with what they are to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the tests
    listeners = {kind: socket.socket(fileno=int(n)) for kind, n in zip(KINDS, numbers)}
    wait_for(listeners.values())
    load(TORCH)
    for kind in (TRAIN, TRANSLATE):
        listener = listeners.pop(kind)
        if os.fork() == 0:
            for other in listeners.values():
                other.close()
            wait_for([listener])
            load(kind)
            return serve(listener)
        listener.close()
    return serve(listeners[TORCH])


def wait_for(listeners):
    """Until somebody asks for one of them, or nobody will any more."""
    with selectors.DefaultSelector() as selector:
        for file in (0, *listeners):
            selector.register(file, selectors.EVENT_READ)
        if any(key.fileobj == 0 for key, _ in selector.select()):
            end()


def end():
    """When all children have ended."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def load(kind):
    for name in IMPORTS[kind]:
        __import__(name)
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{threads}: a fork would have but one of them"


def serve(listener):
    """Fork for every connection, and send how the process has ended; returns in the forks."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    running = {}  # connection -> (process id, file that is ready at its end)

    def forget(connection):
        pid, ended = running.pop(connection)
        selector.unregister(ended)
        os.close(ended)
        selector.unregister(connection)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                files = socket.recv_fds(connection, 1, 4)[1]
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for each in (listener, connection, *running):
                        each.close()
                    for _, ended in running.values():
                        os.close(ended)
                    return read_request(*files)
                for file in files:
                    os.close(file)
                connection.sendall(b"%d\n" % pid)
                running[connection] = pid, os.pidfd_open(pid)
                selector.register(connection, selectors.EVENT_READ)
                selector.register(running[connection][1], selectors.EVENT_READ, connection)
            elif key.fileobj == 0:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                end()
            elif key.data in running:  # it has ended
                with contextlib.suppress(OSError):
                    key.data.sendall(b"%d\n" % forget(key.data))
                key.data.close()
            elif key.fileobj in running:  # nobody waits for it
                os.kill(running[key.fileobj][0], signal.SIGKILL)
                forget(key.fileobj)
                key.fileobj.close()


def read_request(request, *standard_files):
    for number, file in enumerate(standard_files):
        os.dup2(file, number)
        os.close(file)
    with open(request) as content:
        return json.load(content)


# --------------------------------------------------------------------------------------
# the forks


def run_program(program, command, env, cwd, new_session):
    """Make of a fork what Python makes of a new process, and run its program.

    Args:
        program: as in :func:`run_fork`.
        command: the words that a user types for it.
        new_session: see :class:`Fork`.
    """
    if new_session:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    sys.orig_argv = command
    sys.modules["__main__"] = module = ModuleType("__main__")
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    sys.modules[handler].Popen = start_rank
    try:
        if program[0] == "-m":
            sys.path[0] = cwd
            sys.argv = ["-m", *program[2:]]
            runpy._run_module_as_main(program[1])
        else:
            sys.path[0] = os.path.dirname(program[0])
            sys.argv = program
            module.__file__ = program[0]
            with open(program[0], "rb") as file:
                code = compile(file.read(), program[0], "exec")
            exec(code, vars(module))
        leave_with(0)
    except SystemExit as end:
        leave_with(end.code)
        raise
    except Exception:
        leave_with(1)
        raise


def leave_with(code):
    """After the last that Python does at the end, before it takes its modules apart: of a fork,
    which has not got the memory of them yet, this takes longer than many a command."""
    status = 0 if code is None else code if isinstance(code, int) else 1
    LAST.append(lambda: os._exit(status & 0xFF))


LAST = []


@atexit.register  # before anything else does, and so the last to be called
def leave():
    for function in LAST:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        function()


if __name__ == "__main__":
    # what follows is the program's: how it ends, and what is printed of its errors
    run_program(**main(sys.argv[1:]))
