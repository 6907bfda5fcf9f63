"""A stand-in for the Hugging Face Hub on loopback; the client that asks it is the real one.

1. `Hub.add` puts a repository of files there, at one commit, with what the hub says of each: size, git hash, and for
   large files (LFS) the SHA-256.
2. A thread serves the endpoints that the client uses: what a model is, its tree, and its files with their headers and
   ranges. Refusals carry the hub's own error codes.
3. Faults are set per file: `cut` breaks connections off in the middle, `instead` sends other bytes than were announced,
   `lost` files are listed but not there.
4. `log` keeps what was asked; `downloaded` names the files that were sent.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

LARGE = (".safetensors", ".pt", ".bin")
"""Suffixes of files that lie in LFS."""
TOKEN = "hf_stand_in"
"""The one token that opens gated repositories."""


@dataclass
class Hosted:
    """A repository: its files by path, its commit, and what is wrong with it."""

    files: dict[str, bytes]
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    instead: dict[str, bytes] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


@dataclass
class Hub:
    """The stand-in: repositories by name, and what was asked of it."""

    url: str = ""
    cache: Path = Path()
    repositories: dict[str, Hosted] = field(default_factory=dict)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    fault: int = 0

    def add(self, name: str, files: dict[str, bytes], **more) -> Hosted:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories[name] = Hosted(files, commit, **more)
        return self.repositories[name]

    def add_folder(self, name: str, folder: Path, **more) -> Hosted:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add(name, files, **more)

    @property
    def downloaded(self) -> list[str]:
        """Paths of the files that were asked for with GET, in order."""
        return sorted(
            {
                path.partition("/resolve/")[2].partition("/")[2]
                for method, path, _ in self.log
                if method == "GET" and "/resolve/" in path
            }
        )


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.fault:
            return self._answer(self.hub.fault)
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        hosted = self.hub.repositories.get(name)
        if self.headers.get("Authorization") == "Bearer hf_expired":
            return self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if hosted is None:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"})
        if api:
            return self._describe(name, hosted, words[4:])
        self._send(hosted, words[2:])

    def _describe(self, name: str, hosted: Hosted, words: list[str]) -> None:
        revision = "/".join(words[1:])
        if words and revision not in (*hosted.branches, hosted.commit):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = [_entry(path, content) for path, content in hosted.files.items()]
        if words[:1] == ["tree"]:
            folders = {str(parent) for path in hosted.files for parent in Path(path).parents} - {"."}
            described = files + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        else:
            described = {"id": name, "sha": hosted.commit, "private": False, "gated": hosted.gated}
            described["siblings"] = [{"rfilename": path} for path in hosted.files]
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(described).encode())

    def _send(self, hosted: Hosted, words: list[str]) -> None:
        if hosted.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401 if self.headers.get("Authorization") is None else 403
            return self._answer(status, {"X-Error-Code": "GatedRepo"})
        path = "/".join(words[2:])
        if path not in hosted.files or path in hosted.lost:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hosted.commit})
        entry, content = _entry(path, hosted.files[path]), hosted.instead.get(path, hosted.files[path])
        headers = {"X-Repo-Commit": hosted.commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        asked, status = self.headers.get("Range", "").removeprefix("bytes=").rstrip("-"), 200
        if asked:
            status, start = 206, int(asked)
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        cut = self.command == "GET" and hosted.cut.get(path, 0) > 0
        if cut:
            hosted.cut[path] -= 1
        self._answer(status, headers, content, upto=len(content) // 2 if cut else None)

    def _answer(self, status: int, headers: dict | None = None, body: bytes = b"", upto: int | None = None) -> None:
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:upto])
        if upto is not None:
            self.close_connection = True


@contextmanager
def stand_in(monkeypatch, cache: Path) -> Iterator[Hub]:
    """Serves an empty hub, and points the client to it, with a cache of its own and no token."""
    hub = Hub(cache=cache)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
        ("HF_TOKEN_PATH", str(cache / "no-token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The client waits between attempts.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()
