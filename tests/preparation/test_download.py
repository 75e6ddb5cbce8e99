"""Downloads against a real server with faults: what arrives, and what is asked for again."""

import errno
import fcntl
import gzip
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from http_server import FaultyServer

from fairseq_smoe.errors import OptionError
from fairseq_smoe.preparation import transfer
from fairseq_smoe.preparation.download import Download, download_all

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(transfer, "TIMEOUT", 0.5)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(CONTENT)
    with FaultyServer(tmp_path / "served") as server:
        yield server


def job(server, tmp_path, name="a.bin", **known):
    return Download(server.url + name, tmp_path / "got" / name, **known)


def leave_part(download, content, version=None):
    """What an interrupted call leaves."""
    download.path.parent.mkdir()
    Path(f"{download.path}.part").write_bytes(content)
    if version is not None:
        Path(f"{download.path}.part.version").write_text(version)


def etag(content):
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def check_complete(download):
    assert download.path.read_bytes() == CONTENT
    assert os.listdir(download.path.parent) == [download.path.name]


def ranges(server):
    return [wanted for _, wanted in server.requests]


def test_several_files_at_once(server, tmp_path):
    contents = {f"{i}.bin": random.Random(i).randbytes(10_000 * i) for i in range(9)}
    for name, content in contents.items():
        (server.folder / name).write_bytes(content)
    download_all([job(server, tmp_path, name) for name in contents])
    got = tmp_path / "got"
    assert {path.name: path.read_bytes() for path in got.iterdir()} == contents


def test_what_exists_is_not_asked_for(server, tmp_path):
    download = job(server, tmp_path, size=len(CONTENT), sha256=SHA256)
    download_all([download])
    download_all([download])
    assert ranges(server) == [None]
    check_complete(download)


@pytest.mark.parametrize("validator", ["etag", "date"])
def test_cut_connections_are_resumed(server, tmp_path, validator):
    server.validator, server.cut_after, server.cuts = validator, 100_000, 2
    download_all([download := job(server, tmp_path)])
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-"]
    assert server.bytes_sent == len(CONTENT)
    check_complete(download)


def test_progress_renews_patience(server, tmp_path):
    server.cut_after, server.cuts = 30_000, 9
    download_all([download := job(server, tmp_path)], retries=1)
    assert len(server.requests) == 10
    check_complete(download)


def test_patience_ends_without_progress(server, tmp_path):
    # without ranges every attempt starts from zero and breaks at the same place
    server.ranges, server.cut_after, server.cuts = False, 30_000, 1000
    with pytest.raises(OptionError, match=r"30000 of 300000 bytes; gave up after 2 retries"):
        download_all([job(server, tmp_path)], retries=2)
    assert len(server.requests) == 3


def test_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.cut_after, server.cuts = False, 100_000, 1
    download_all([download := job(server, tmp_path)])
    assert ranges(server) == [None, "bytes=100000-"]
    check_complete(download)


def test_stalled_connection_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.05)
    server.delay = 0.2
    threading.Timer(0.3, lambda: setattr(server, "delay", 0)).start()
    download_all([download := job(server, tmp_path)], retries=20)
    assert len(server.requests) > 1
    check_complete(download)


def test_nobody_listens(tmp_path):
    with FaultyServer(tmp_path) as gone:
        pass
    with pytest.raises(OptionError, match="refused; gave up after 1 retries.*--base-url.*--from"):
        download_all([job(gone, tmp_path)], retries=1)


@pytest.mark.parametrize("status", [503, 429, 500])
def test_busy_server_is_asked_again(server, tmp_path, status):
    server.statuses = [status, status]
    download_all([download := job(server, tmp_path)])
    assert len(server.requests) == 3
    check_complete(download)


@pytest.mark.parametrize("as_date", [False, True])
def test_server_names_the_wait(server, tmp_path, as_date):
    begin = time.time()
    server.statuses = [429]
    server.retry_after = formatdate(begin + 2, usegmt=True) if as_date else "1"
    download_all([job(server, tmp_path)])
    assert 0.9 < time.time() - begin < 5


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_stops_at_once(server, tmp_path, status):
    server.statuses = [status]
    message = f"{server.url}a.bin: the server answers {status} .*--base-url.*--from"
    with pytest.raises(OptionError, match=message) as error:
        download_all([job(server, tmp_path)])
    assert len(server.requests) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://x/y", "data/file", "http://a b/", "http://[x/"])
def test_not_an_address(tmp_path, url):
    with pytest.raises(OptionError, match=re.escape(url)):
        download_all([Download(url, tmp_path / "x")])


def test_one_failure_stops_the_others_and_keeps_their_parts(server, tmp_path):
    server.delay = 0.02  # about 1.5 s for a.bin
    jobs = [job(server, tmp_path), job(server, tmp_path, "missing.bin")]
    with pytest.raises(OptionError, match="missing.bin: the server answers 404"):
        download_all(jobs)
    assert not jobs[0].path.exists()
    server.delay = 0
    (server.folder / "missing.bin").write_bytes(b"here now")
    download_all(jobs)
    assert jobs[0].path.read_bytes() == CONTENT and jobs[1].path.read_bytes() == b"here now"


def test_part_of_another_version_is_not_continued(server, tmp_path):
    download = job(server, tmp_path)
    leave_part(download, b"old version", etag(b"old version, complete"))
    download_all([download])
    assert ranges(server) == ["bytes=11-"]
    check_complete(download)


def test_server_that_ignores_if_range(server, tmp_path):
    server.honest_if_range = False
    download = job(server, tmp_path)
    leave_part(download, b"old version", etag(b"old version, complete"))
    download_all([download])
    assert ranges(server) == ["bytes=11-", None]
    check_complete(download)


def test_server_that_sends_another_range(server, tmp_path):
    server.shift, server.cut_after, server.cuts = 5, 100_000, 1
    download_all([download := job(server, tmp_path)])
    assert ranges(server) == [None, "bytes=100000-", None]
    check_complete(download)


def test_without_version_and_checksum_starts_again(server, tmp_path):
    server.validator, server.cut_after, server.cuts = None, 100_000, 1
    download_all([download := job(server, tmp_path, size=len(CONTENT))])
    assert ranges(server) == [None, None]
    check_complete(download)


def test_without_version_but_with_checksum_goes_on(server, tmp_path):
    server.validator, server.cut_after, server.cuts = None, 100_000, 1
    download_all([download := job(server, tmp_path, sha256=SHA256)])
    assert ranges(server) == [None, "bytes=100000-"]
    check_complete(download)


def test_killed_between_the_last_byte_and_the_name(server, tmp_path):
    download = job(server, tmp_path)  # size unknown: the server says 416
    leave_part(download, CONTENT, etag(CONTENT))
    download_all([download])
    assert ranges(server) == [f"bytes={len(CONTENT)}-"] and server.bytes_sent == 0
    check_complete(download)


def test_complete_part_of_known_size_needs_no_request(server, tmp_path):
    download = job(server, tmp_path, size=len(CONTENT), sha256=SHA256)
    leave_part(download, CONTENT)
    download_all([download])
    assert server.requests == []
    check_complete(download)


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_part_longer_than_the_file(server, tmp_path, size):
    download = job(server, tmp_path, size=size, sha256=SHA256)
    leave_part(download, CONTENT + b"x")
    download_all([download])
    check_complete(download)


def test_wrong_content_is_fetched_once_more(server, tmp_path):
    server.wrong, server.times_wrong = b"<html>", 1
    download_all([download := job(server, tmp_path, sha256=SHA256)])
    assert ranges(server) == [None, None]
    check_complete(download)


def test_damaged_part_is_fetched_again(server, tmp_path):
    download = job(server, tmp_path, sha256=SHA256)
    leave_part(download, b"damaged", etag(CONTENT))
    download_all([download])
    assert ranges(server) == ["bytes=7-", None]
    check_complete(download)


@pytest.mark.parametrize(
    "known, message",
    [
        ({"sha256": SHA256}, f"expected SHA-256 {SHA256}, found [0-9a-f]{{64}}"),
        ({"size": len(CONTENT)}, "expected 300000 bytes, found 2"),
        ({"check": lambda path: f"{path.name} looks odd"}, "a.bin.part looks odd"),
    ],
)
def test_wrong_content_twice(server, tmp_path, known, message):
    server.wrong, server.times_wrong = b"no", 2
    download = job(server, tmp_path, **known)
    with pytest.raises(OptionError, match=f"{download.path}: {message}, as fetched twice"):
        download_all([download])
    assert len(server.requests) == 2 and os.listdir(tmp_path / "got") == []


def test_no_length_announced(server, tmp_path):
    server.length = False
    download_all([download := job(server, tmp_path, size=len(CONTENT))])
    check_complete(download)


def test_compressed_files_stay_as_they_are(server, tmp_path):
    (server.folder / "a.gz").write_bytes(gzip.compress(CONTENT))
    download_all([download := job(server, tmp_path, "a.gz")])
    assert gzip.decompress(download.path.read_bytes()) == CONTENT


CHILD = """
import sys
from pathlib import Path
from fairseq_smoe.preparation.download import Download, download_all
try:
    download_all([Download(sys.argv[1], Path(sys.argv[2]))])
except KeyboardInterrupt:
    sys.exit("ended by the user")
"""


def start_child(download):
    """Another process that fetches the same file; returns when its part has begun."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, download.url, str(download.path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    part = Path(f"{download.path}.part")
    while not part.exists() or part.stat().st_size < 20_000:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    return child


def test_sigkill_then_the_rest_only(server, tmp_path):
    download = job(server, tmp_path)
    server.delay = 0.02
    child = start_child(download)
    child.kill()
    child.wait()
    assert not download.path.exists()
    there = Path(f"{download.path}.part").stat().st_size
    server.delay = 0
    download_all([download])
    assert 20_000 <= there < len(CONTENT) and ranges(server) == [None, f"bytes={there}-"]
    check_complete(download)


def test_ctrl_c_ends_even_a_stalled_download(server, tmp_path):
    server.delay = 0.02
    child = start_child(job(server, tmp_path))
    server.delay = 60
    time.sleep(0.3)
    begin = time.time()
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 1 and stderr.endswith("ended by the user\n")
    assert time.time() - begin < 10


def test_two_processes(server, tmp_path):
    download = job(server, tmp_path)
    server.delay = 0.02
    child = start_child(download)
    with pytest.raises(OptionError, match=r"a.bin: another process is downloading it"):
        download_all([download])
    server.delay = 0
    assert child.wait(timeout=30) == 0
    check_complete(download)


def test_another_process_finished_meanwhile(server, tmp_path, monkeypatch):
    download = job(server, tmp_path)
    leave_part(download, CONTENT)

    def finish_then_lock(part, how):
        os.replace(part.name, download.path)

    monkeypatch.setattr(fcntl, "flock", finish_then_lock)
    download_all([download])
    assert server.requests == []
    check_complete(download)


def test_another_process_began_anew_meanwhile(server, tmp_path, monkeypatch):
    download = job(server, tmp_path)
    leave_part(download, b"old")
    (tmp_path / "new").write_bytes(b"new")
    monkeypatch.setattr(fcntl, "flock", lambda part, how: os.replace(tmp_path / "new", part.name))
    with pytest.raises(OptionError, match="another process"):
        download_all([download])


def test_file_that_takes_a_little_at_a_time():
    taken = bytearray()

    class Reluctant:
        def write(self, view):
            taken.extend(view[:2])
            return len(view[:2])

    transfer._write(b"seven b", Reluctant())
    assert taken == b"seven b"


def test_file_system_without_locks(server, tmp_path, monkeypatch):
    def refuse(part, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    download_all([download := job(server, tmp_path)])
    check_complete(download)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 128 KiB, where mounting is permitted."""
    folder = tmp_path / "got"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_then_space(server, tmp_path, small_disk):
    download = job(server, tmp_path)
    with pytest.raises(OptionError, match="a.bin: the disk is full"):
        download_all([download])
    there = Path(f"{download.path}.part").read_bytes()
    assert len(there) > 50_000 and CONTENT.startswith(there) and not download.path.exists()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    download_all([download])
    assert ranges(server) == [None, f"bytes={len(there)}-"]
    check_complete(download)


def test_full_disk_where_mounting_is_not_permitted(server, tmp_path, monkeypatch):
    def write_little(chunk, part):
        part.write(chunk[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    download = job(server, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_write", write_little)
        with pytest.raises(OptionError, match="a.bin: the disk is full"):
            download_all([download])
    download_all([download])
    assert ranges(server) == [None, "bytes=1000-"]
    check_complete(download)
