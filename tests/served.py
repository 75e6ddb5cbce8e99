"""A server that runs, and clients of it."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import toy_task
from spoken_model import generated, spoken, spoken_data  # noqa: F401

__all__ = ["generated", "packed", "server", "serving", "spoken", "spoken_data"]


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


@dataclass
class Running:
    """A server's process.

    Attributes:
        url: with a slash at the end.
        log: file with what it prints.
    """

    process: subprocess.Popen
    url: str
    log: object

    @property
    def port(self):
        return int(re.search(r":(\d+)/", self.url)[1])

    def ask(self, path="translate", fields=None, body=None, method=None, headers=None, timeout=60):
        """Send a request; ``fields`` as JSON."""
        if fields is not None:
            body = json.dumps(fields).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        request = urllib.request.Request(
            self.url + path, data=body, headers=headers or {}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def translate(self, text, source="en", target="aa", **more):
        answer = self.ask(fields={"q": text, "source": source, "target": target, **more})
        assert answer.status == 200, answer.body
        return answer.json["translatedText"]

    def metric(self, name):
        found = re.search(rf"^fairseq_smoe_{name} (\S+)$", self.ask("metrics").body.decode(), re.M)
        return float(found[1])

    def workers(self):
        """Process numbers of those that translate."""
        listed = subprocess.run(
            ["ps", "-ww", "-o", "pid=", "-o", "args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        return [int(line.split()[0]) for line in listed if "spawn_main" in line]


@contextmanager
def serving(model, folder, *options):
    """A server as ``python -m fairseq_smoe serve`` starts it."""
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "fairseq_smoe", "serve", str(model)),
                *("--port", "0", *map(str, options)),
            ],
            stderr=file,
            env={**toy_task.environment(), "PYTHONPATH": str(toy_task.REPOSITORY)},
        )
    try:
        while not (found := re.search(r"^(http://\S+)$", log.read_text(), re.M)):
            assert process.poll() is None, log.read_text()
            signal.sigtimedwait([], 0.05)
        yield Running(process, found[1], log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def packed(spoken, make_once):  # noqa: F811
    from fairseq_smoe.__main__ import main

    def make(folder):
        main(["pack", str(spoken), "--to", str(folder / "model")])

    return make_once("served", make) / "model"


@pytest.fixture(scope="module")
def server(packed, tmp_path_factory):
    with serving(packed, tmp_path_factory.mktemp("server")) as running:
        yield running
