"""The server under load for minutes: with the toy task's model, or, if the variable DEMO_OUTPUT
names the folder that the demo has left, with that of the demo."""

import os
import random
import statistics
import threading
import time
from pathlib import Path

import pytest
from served import serving

from fairseq_smoe import Translator

CLIENTS, SECONDS = 64, 180


def memory_of(processes):
    """Resident memory in MB."""
    found = 0
    for number in processes:
        status = Path(f"/proc/{number}/status").read_text()
        found += int(status.split("VmRSS:")[1].split()[0]) / 1024
    return found


def sentences_per_second(server, cases, seconds=20):
    """Of a single client, which waits for each answer."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        text, source, target, _ = cases[number % len(cases)]
        server.translate(text, source, target)
        number += 1
    return number / seconds


@pytest.fixture
def loaded(request):
    """``(model, cases)``; a case is a text, its source and target language, and its translation."""
    if demo := os.environ.get("DEMO_OUTPUT"):
        return demo_cases(Path(demo))
    cases = [
        (text, *direction.split("-"), line)
        for direction, own in request.getfixturevalue("generated").items()
        for text, line in zip(own.sources, own.lines, strict=True)
    ]
    return request.getfixturevalue("packed"), cases


def demo_cases(folder):
    """The first lines of the demo's test sets, as ``Translator`` translates them."""
    model = folder / "SMoE-2-2-2-2" / "averaged.pt"
    translator, cases = Translator.load(model, folder / "data", threads=2), []
    for source, target in translator.directions:
        pairs = f"{source}-{target}", f"{target}-{source}"
        paths = (folder / "data" / f"test.{pair}.{source}.txt" for pair in pairs)
        texts = next(path for path in paths if path.exists()).read_text().splitlines()[:50]
        found = translator.translate(texts, source, target)
        cases += [(text, source, target, r.text) for text, r in zip(texts, found)]
    return model, cases


@pytest.mark.slow
def test_many_clients_for_minutes(loaded, tmp_path, capsys):
    """No answer is wrong, lost or doubled; many are served faster than one; memory stays."""
    model, cases = loaded
    random.Random(1).shuffle(cases)
    with serving(model, tmp_path) as server:
        alone = sentences_per_second(server, cases)
        seconds, wrong, lock = [], [], threading.Lock()
        end = time.monotonic() + SECONDS

        def client(number):
            drawn = random.Random(number)
            while time.monotonic() < end:
                text, source, target, line = drawn.choice(cases)
                started = time.monotonic()
                found = server.translate(text, source, target)
                with lock:
                    seconds.append(time.monotonic() - started)
                    if found != line:
                        wrong.append((text, found))

        before = server.metric("worker_sentences")
        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        memory = []
        while time.monotonic() < end:
            time.sleep(1)
            memory.append(memory_of([server.process.pid, *server.workers()]))
        for thread in clients:
            thread.join()
        assert not wrong
        assert server.metric("worker_sentences") - before == len(seconds)
        together = len(seconds) / SECONDS
        late = memory[len(memory) // 3 :]
        first, last = (statistics.median(part) for part in (late[:20], late[-20:]))
        p95 = statistics.quantiles(seconds, n=20)[-1]
        with capsys.disabled():
            print(
                f"\none client {alone:.0f} sentences/s, {CLIENTS} clients {together:.0f}; 95% within "
                f"{p95 * 1000:.0f} ms; memory {first:.0f} MB, then {last:.0f}"
            )
        assert together > 3 * alone
        assert last < 1.05 * first
