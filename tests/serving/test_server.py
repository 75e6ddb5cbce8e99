"""The server, as its clients see it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import toy_task
from served import serving

from fairseq_smoe.__main__ import main

pytestmark = pytest.mark.xdist_group("server")  # one worker makes what all of them need


def cases_of(generated):
    return [
        (text, *direction.split("-"), line)
        for direction, own in generated.items()
        for text, line in zip(own.sources, own.lines, strict=True)
    ]


def test_32_clients_get_the_translations_of_fairseq_generate(server, generated):
    cases = cases_of(generated)
    assert len(cases) >= 200
    random.Random(1).shuffle(cases)
    with ThreadPoolExecutor(32) as clients:
        found = list(clients.map(lambda case: server.translate(*case[:3]), cases))
    assert found == [line for *_, line in cases]
    # they were translated together
    assert server.metric("worker_batches") < 0.7 * server.metric("worker_sentences")


def test_lists_lines_and_alternatives(server, generated):
    own = generated["en-aa"]
    texts, lines = own.sources[:5], own.lines[:5]
    assert server.translate(texts) == lines
    assert server.translate("\n".join([texts[0], "", texts[1]])) == f"{lines[0]}\n\n{lines[1]}"
    assert server.translate("") == "" and server.translate(["", " "]) == ["", ""]
    fields = {"q": texts[:2], "source": "en", "target": "aa", "alternatives": 3}
    answer = server.ask(fields=fields).json
    assert answer["translatedText"] == lines[:2]
    for best, others in zip(lines, answer["alternatives"]):
        assert len({best, *others}) == 4
    fields["q"] = texts[0]
    assert server.ask(fields=fields).json["alternatives"] == answer["alternatives"][0]


def test_the_passes_of_the_tokens_on_demand(server):
    answer = server.ask(
        fields={"q": "en1 en2\nen3", "source": "en", "target": "bb", "capacity": True}
    ).json
    assert len(answer["capacity"]) == 2
    for side in ("encoder", "decoder"):
        tokens = answer["capacity"][0][side]["tokens"]
        assert tokens[0]["piece"] == "__bb__" and tokens[-1]["piece"] == "</s>"
        passes = [p for token in tokens for p in token["passes"]]
        mean = sum(passes) / len(passes)
        assert answer["capacity"][0][side]["mean"] == pytest.approx(mean, abs=1e-3)
        assert all(len(t["experts"][0]) == t["passes"][0] for t in tokens)
    assert answer["directionCapacity"]["sentences"] >= 2
    assert "capacity" not in server.ask(fields={"q": "en1", "source": "en", "target": "aa"}).json


def test_clients_of_libretranslate_work_unchanged(server, generated, tmp_path):
    from libretranslatepy import LibreTranslateAPI

    own = generated["en-aa"]
    client = LibreTranslateAPI(server.url)
    assert [client.translate(text, "en", "aa") for text in own.sources[:3]] == own.lines[:3]
    listed = {entry["code"]: entry for entry in client.languages()}
    assert listed["en"]["name"] == "English" and listed["en"]["targets"] == ["aa", "bb"]


def test_a_translator_of_catalogues_works_unchanged(server, generated, tmp_path):
    import polib

    own = generated["en-bb"]
    texts = dict(zip(own.sources[:6], own.lines[:6]))
    catalogue = polib.POFile()
    catalogue.metadata = {"Content-Type": "text/plain; charset=utf-8", "Language": "bb"}
    catalogue.extend(polib.POEntry(msgid=text, msgstr="") for text in texts)
    path = tmp_path / "messages.po"
    catalogue.save(str(path))
    done = subprocess.run(
        [toy_task.COMMANDS / "transpolibre", "--url", server.url, "--source-lang", "en"]
        + ["--target-lang", "bb", "--file", path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry.msgid: entry.msgstr for entry in polib.pofile(str(path))} == texts


GOOD = {"q": "en1", "source": "en", "target": "aa"}
DEEP = b"[" * 200_000
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def fields(**changes):
    return {"fields": {**GOOD, **changes}}


HOSTILE = {
    "no body": (400, {"body": b""}),
    "no JSON": (400, {"body": b"q=en1"}),
    "half of JSON": (400, {"body": b'{"q": "en1", "sour', "headers": JSON}),
    "deep JSON": (400, {"body": DEEP, "headers": JSON}),
    "deep objects": (400, {"body": b'{"q":' * 100_000, "headers": JSON}),
    "JSON that is no object": (400, {"body": b'["en1"]', "headers": JSON}),
    "a number": (400, {"body": b"1e999", "headers": JSON}),
    "a huge number": (400, {"body": b"9" * 5000, "headers": JSON}),
    "no UTF-8": (400, {"body": b'{"q": "\xff"}', "headers": JSON}),
    "zero bytes": (400, {"body": bytes(1000), "headers": JSON}),
    "a form without UTF-8": (400, {"body": b"q=\xff\xfe", "headers": FORM}),
    "a form of 1,000 fields": (400, {"body": b"a=1&" * 1000, "headers": FORM}),
    "multipart": (400, {"body": b"--x", "headers": {"Content-Type": "multipart/form-data"}}),
    "an archive": (400, {"body": b"PK\x03\x04" + bytes(100)}),
    "no q": (400, {"fields": {"source": "en", "target": "aa"}}),
    "q null": (400, fields(q=None)),
    "q a number": (400, fields(q=7)),
    "q an object": (400, fields(q={"a": 1})),
    "q an empty list": (400, fields(q=[])),
    "q with a list inside": (400, fields(q=["en1", ["en2"]])),
    "half of a surrogate pair": (400, {"body": b'{"q":"\\ud800","source":"en","target":"aa"}'}),
    "too many texts": (413, fields(q=["en1"] * 501)),
    "too many characters": (413, fields(q="en1 " * 6000)),
    "a body of 10 MB": (413, {"body": b"x" * 10_000_000, "headers": JSON}),
    "no source": (400, {"fields": {"q": "en1", "target": "aa"}}),
    "no target": (400, {"fields": {"q": "en1", "source": "en"}}),
    "source a list": (400, fields(source=["en"])),
    "source auto": (400, fields(source="auto")),
    "an unknown source": (400, fields(source="xx")),
    "an unknown target": (400, fields(target="../../etc/passwd")),
    "a long target": (400, fields(target="a" * 100_000)),
    "a target with line breaks": (400, fields(target="a\r\nX-Injected: 1")),
    "the source as target": (400, fields(target="en")),
    "HTML": (400, fields(format="html")),
    "alternatives -1": (400, fields(alternatives=-1)),
    "alternatives 5": (400, fields(alternatives=5)),
    "alternatives true": (400, fields(alternatives=True)),
    "alternatives many": (400, fields(alternatives="9" * 5000)),
    "another method": (405, {"method": "GET"}),
    "DELETE": (405, {"method": "DELETE"}),
    "another path": (404, {"path": "detect", "fields": {"q": "en1"}}),
    "a path outside": (404, {"path": "../../../etc/passwd"}),
    "an encoded path outside": (404, {"path": "%2e%2e%2fserver.py"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_and_hostile_requests(name, server):
    status, request = HOSTILE[name]
    answer = server.ask(**request)
    assert answer.status == status and "X-Injected" not in answer.headers
    (error,) = answer.json.values()
    assert list(answer.json) == ["error"] and error and len(error) < 200 and "\n" not in error
    assert "Traceback" not in error and "fairseq_smoe" not in error


def test_the_server_is_well_after_all_of_them(server):
    assert server.translate("en1 en2") == "aa2 aa1"
    assert server.ask("health").json == {"status": "ok", "workers": 1}
    log = server.log.read_text()
    assert "Traceback" not in log and "en1" not in log and "Exception" not in log


def test_a_body_that_does_not_come(packed, tmp_path):
    with serving(packed, tmp_path, "--timeout", 1) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /translate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(20)
            assert b" 408 " in slow.recv(10_000).split(b"\r\n")[0]
        assert server.translate("en1 en2") == "aa2 aa1"


def test_a_client_that_goes_away_is_not_translated_for(server):
    before = server.metric("worker_sentences")
    body = json.dumps({"q": ["en1 en2 en3"] * 400, "source": "en", "target": "aa"}).encode()
    head = f"POST /translate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in [head + body] * 10 + [head + body[:100], head, head[:20]]:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(sent)
    assert server.translate("en1 en2") == "aa2 aa1"
    assert server.metric("queue_tokens") == 0
    assert server.metric("worker_sentences") - before < 4000
    assert "Traceback" not in server.log.read_text()


def test_a_process_that_is_killed_comes_back(packed, tmp_path):
    with serving(packed, tmp_path) as server:
        (worker,) = server.workers()
        statuses = []
        texts = ["en1 en2 en3"] * 500

        def ask():
            fields = {"q": texts, "source": "en", "target": "aa"}
            statuses.append(server.ask(fields=fields).status)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        while not server.metric("worker_batches"):
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)
        for client in clients:
            client.join()
        # those in the process are told, those that waited are translated by the next one
        assert set(statuses) <= {200, 503} and 503 in statuses
        assert server.translate("en1 en2") == "aa2 aa1"
        assert server.metric("worker_restarts") == 1 and server.workers() != [worker]


def test_a_signal_under_load_loses_no_answer(packed, generated, tmp_path):
    cases = cases_of(generated)
    with serving(packed, tmp_path) as server:
        answered, refused, wrong = [], [], []

        def ask(number):
            for text, source, target, line in cases[number::16] * 50:
                try:
                    fields = {"q": text, "source": source, "target": target}
                    answer = server.ask(fields=fields)
                except OSError:  # no connection; a broken answer would be another exception
                    refused.append(text)
                    return
                answered.append(text)
                if answer.status != 200 or answer.json["translatedText"] != line:
                    wrong.append((answer.status, answer.body))

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for client in clients:
            client.start()
        while len(answered) < 30:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert server.process.wait(30) == 0
        assert not wrong and len(refused) == 16 and len(answered) >= 30
        assert "Traceback" not in server.log.read_text()


def test_keys_rates_and_a_full_queue(packed, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond key\n")
    options = ("--keys", keys, "--requests-per-minute", 6, "--queue-tokens", 50)
    with serving(packed, tmp_path, *options) as server:
        for key in (None, "", "third", "first\n", ["first"], 1):
            assert server.ask(fields={**GOOD, "api_key": key}).status == 403
        bearer = {"Authorization": "Bearer second key"}
        statuses = [server.ask(fields=GOOD, headers=bearer).status for _ in range(3)]
        statuses += [server.ask(fields={**GOOD, "api_key": "first"}).status for _ in range(3)]
        assert statuses == [200] * 6
        answer = server.ask(fields=GOOD, headers=bearer)
        assert answer.status == 429 and 1 <= int(answer.headers["retry-after"]) <= 10
    with serving(packed, tmp_path, "--queue-tokens", 50) as server:
        many = {**GOOD, "q": ["en1 en2 en3"] * 200}
        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(lambda _: server.ask(fields=many), range(16)))
        assert {answer.status for answer in answers} == {200, 503}
        full = next(answer for answer in answers if answer.status == 503)
        assert "retry-after" in full.headers and "waits" in full.json["error"]


def test_mistakes_are_told_in_one_line(packed, tmp_path):
    (tmp_path / "empty").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in (
            (["--port", port], f"--host 127.0.0.1 --port {port}: Address already in use"),
            (["--port", "99999"], "--host 127.0.0.1 --port 99999: "),
            (["--workers", "0"], "--workers 0: expected more than 0"),
            (["--wait", "-1"], "--wait -1.0: expected 0 or more"),
            (["--keys", tmp_path / "empty"], "--keys .*empty: has no key"),
            (["--keys", tmp_path / "none"], ".*none: no such file"),
        ):
            with pytest.raises(SystemExit, match=f"error: {message}"):
                main(["serve", str(packed), *(["--port", "0"] if "--port" not in words else [])]
                     + list(map(str, words)))  # fmt: skip
    with pytest.raises(SystemExit, match="no such file or folder"):
        main(["serve", str(tmp_path / "none"), "--port", "0"])


def test_without_its_packages_it_says_what_to_install(packed):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from fairseq_smoe.__main__ import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(packed)],
        capture_output=True,
        text=True,
        cwd=toy_task.REPOSITORY,
    )
    assert done.returncode == 1 and "pip install 'fairseq-smoe[serve]'" in done.stderr
