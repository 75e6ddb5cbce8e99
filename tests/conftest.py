"""Data and trained models for the end-to-end tests.

They are made once, by the first test that asks, and shared by all workers of ``pytest -n``.
"""

import os
import shutil
import signal

import fork_server
import pytest
import toy_task
from filelock import FileLock

# before torch is imported: more threads only slow such small models down
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--own-processes",
        action="store_true",
        help="start no command as a fork of a server that has imported its modules: much slower",
    )

    parser.addoption(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="what the tests marked gpu run on; cpu tries the tests themselves",
    )


def pytest_configure(config):
    # a shell that starts the tests in the background has them, and all they start, ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes minutes; deselect with -m 'not slow'")
    config.addinivalue_line("markers", "gpu: needs a GPU, or --device cpu")
    # the workers of pytest -n have that of the process that starts them
    if not config.option.own_processes and fork_server.VARIABLE not in os.environ:
        server = fork_server.serving(toy_task.environment())
        server.__enter__()
        config.add_cleanup(lambda: server.__exit__(None, None, None))


def pytest_collection_modifyitems(config, items):
    # the longest first: at the end, the other workers would wait for it
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))
    if config.option.device == "cuda" and not has_gpu():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no GPU that torch can use"))


def has_gpu():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def same_environment():
    """A variable left behind would change, and slow, the commands of all later tests."""
    before = dict(os.environ)
    yield
    changed = {
        name: os.environ.get(name)
        for name in before.keys() ^ os.environ.keys()
        | {name for name in before.keys() & os.environ.keys() if before[name] != os.environ[name]}
        if not name.startswith(fork_server.OTHERS)
    }
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in changed if name in before})
    assert not changed, "a test is to leave the environment as it was"


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """``make_once(name, make)`` calls ``make(folder)`` with a new folder, once, and returns it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the part that workers have in common

    def make_once(name, make):
        folder = base / "shared" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            done = folder / ".done"
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def text(make_once):
    """Folder of the toy task's text files."""
    return make_once("text", toy_task.write_corpus)


@pytest.fixture(scope="session")
def data(make_once, text):
    """Folder of the binarised toy task."""
    return make_once("data", lambda folder: toy_task.preprocess(text, folder))


@pytest.fixture(scope="session")
def trained(make_once, data):
    """``trained(name)``: checkpoint of a row of ``toy_task.MODELS`` that has learned the task."""

    def trained(name):
        def make(folder):
            toy_task.train(data, folder, *toy_task.MODELS[name], **toy_task.LONG_ENOUGH)

        return make_once(f"trained-{name}", make) / "checkpoint_last.pt"

    return trained


@pytest.fixture(scope="session")
def short_run(make_once, data):
    """A folder with 30 updates of the SMoE model: ``checkpoint_last.pt``, ``stdout`` and
    ``tensorboard/``."""

    def make(folder):
        outcome = toy_task.train(
            data,
            folder,
            *toy_task.MODELS["smoe"],
            max_update=30,
            tensorboard_logdir=folder / "tensorboard",
        )
        (folder / "stdout").write_text(outcome.stdout)

    return make_once("short-run", make)
