"""A web server on this machine whose faults can be switched on.

with FaultyServer(folder) as server:
    server.cut_after, server.cuts = 1000, 2   # the first two answers end after 1000 bytes
    download(server.url + "file.bin")
    assert server.requests == [("/file.bin", None), ("/file.bin", "bytes=1000-"), ...]
"""

import hashlib
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves the files of ``folder`` with ranges and ETags. Attributes switch faults:

    cut_after, cuts: close the connection after so many bytes of the body, so many times
    statuses: answers to give first, e.g. ``[503, 429]``, before the real ones
    retry_after: value of that header in these answers
    ranges: False ignores Range requests
    validator: "etag", "date" or None
    honest_if_range: False sends a range even if the file has changed
    shift: ranges begin so many bytes too late
    wrong, times_wrong: bytes to send instead of a file's, so many times
    delay: seconds before each chunk of 4 KiB
    length: False sends no Content-Length
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.cut_after, self.cuts = None, 0
        self.statuses, self.retry_after = [], None
        self.ranges, self.validator, self.honest_if_range = True, "etag", True
        self.shift = 0
        self.wrong, self.times_wrong = b"", 0
        self.delay, self.length = 0.0, True
        self.requests = []  # (path, value of the Range header or None)
        self.bytes_sent = 0
        handler = type("Handler", (_Handler,), {"settings": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self):
        serve = self._server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    settings = None  # the FaultyServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.settings, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        path = server.folder / self.path.partition("?")[0].lstrip("/")
        if server.statuses:
            self.refuse(server.statuses.pop(0))
        elif not path.is_file():
            self.refuse(404)
        elif server.times_wrong:
            server.times_wrong -= 1
            self.answer(200, server.wrong, {})
        else:
            self.serve(path.read_bytes(), path.stat().st_mtime, wanted)

    def serve(self, content, modified, wanted):
        server, headers = self.settings, {}
        if server.validator == "etag":
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        elif server.validator == "date":
            headers["Last-Modified"] = formatdate(modified, usegmt=True)
        condition = self.headers.get("If-Range")
        unchanged = condition in (None, *headers.values()) or not server.honest_if_range
        if not (wanted and server.ranges and unchanged):
            self.answer(200, content, headers)
        elif (start := int(wanted.removeprefix("bytes=").removesuffix("-"))) >= len(content):
            self.refuse(416, {"Content-Range": f"bytes */{len(content)}"})
        else:
            start += server.shift
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[start:], headers)

    def refuse(self, status, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if self.settings.retry_after is not None:
            self.send_header("Retry-After", self.settings.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, status, body, headers):
        server = self.settings
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            body = body[: server.cut_after]
        try:
            for start in range(0, len(body), 4096):
                time.sleep(server.delay)
                self.wfile.write(body[start : start + 4096])
                server.bytes_sent += len(body[start : start + 4096])
        except ConnectionError:
            pass  # the client has gone
