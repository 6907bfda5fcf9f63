"""A page for this machine alone: a server on the loopback address that gives one page and takes its groups.

1. It listens on 127.0.0.1, on a port that the system chooses unless one is asked for.
2. It answers `/` with the page, and `/pages/...` with files of one folder, where feature pages were given. There is no
   listing, and no path leads out of the folder, links included.
3. It takes groups at `/groups` from the page alone: the request must carry the token that lies in the page, and name
   this server as its host, so that no other site's page can write through a browser.
"""

import mimetypes
import re
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from difffract_jax.config import UserError

HOST = "127.0.0.1"
MOST_BYTES = 32 * 2**20
"""Of a request that saves groups."""
PAGES = "/pages/"
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'self'",  # a page's own element cannot say this
}


class PageServer(ThreadingHTTPServer):
    """Serves one page; `serve_forever` runs it."""

    daemon_threads = True
    allow_reuse_address = False

    def __init__(
        self, page: Callable[[str], str], save: Callable[[str], str], *, port: int = 0, pages: Path | None = None
    ):
        """Binds the port.

        Args:
            page: from the token to the page's HTML.
            save: takes the text of a groups file, and returns what to tell; raises `UserError` to refuse it.
            port: to listen on; 0 for a free one.
            pages: folder of feature pages.

        Raises:
            UserError: if the port is in use or may not be used.
        """
        self.token, self.save = secrets.token_urlsafe(24), save
        self.page = page(self.token).encode()
        self.pages = None if pages is None else pages.resolve()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"Port {port} of this machine cannot be listened on ({why}); leave --port out, and a free one is taken."
            ) from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; everything that is not listed in the module is refused."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "difffract"
    sys_version = ""
    timeout = 30

    def do_GET(self) -> None:
        """Gives the page or a feature page."""
        path = unquote(urlsplit(self.path).path)
        if not self._is_ours():
            return
        if path == "/":
            self._answer(200, self.server.page, "text/html; charset=utf-8")
        elif (file := self._file(path)) is not None:
            self._give(file)
        else:
            self._answer(404, b"There is nothing at this address.")

    def do_POST(self) -> None:
        """Takes groups."""
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            return
        if self.path != "/groups":
            return self._answer(404, b"There is nothing at this address.", close=True)
        if not secrets.compare_digest(self.headers.get("X-Token", "").encode(), self.server.token.encode()):
            return self._answer(403, b"Only the page that this server gave may save groups.", close=True)
        if not re.fullmatch("[0-9]{1,10}", length) or int(length) > MOST_BYTES:
            return self._answer(413, b"These groups are too large to be saved.", close=True)
        try:
            answer = self.server.save(self.rfile.read(int(length)).decode("utf-8"))
        except UserError as error:
            return self._answer(400, str(error).encode())
        except UnicodeDecodeError:
            return self._answer(400, b"The groups are not text in UTF-8.")
        except OSError as error:
            return self._answer(500, f"The groups could not be written: {error.strerror}.".encode())
        return self._answer(200, answer.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of requests."""

    def _is_ours(self) -> bool:
        """Says whether the request names this server; another site's name that resolves to this machine does not."""
        if self.headers.get("Host") == f"{HOST}:{self.server.server_address[1]}":
            return True
        self._answer(403, b"This server answers to its own address alone.", close=True)
        return False

    def _give(self, file: Path) -> None:
        """Answers with a file; one that cannot be read, or is gone by now, is told in a sentence."""
        try:
            content = file.read_bytes()
        except OSError as error:
            return self._answer(403, f"{file.name} cannot be read ({error.strerror}).".encode())
        return self._answer(200, content, mimetypes.guess_type(file.name)[0] or "application/octet-stream")

    def _file(self, path: str) -> Path | None:
        """Returns the file of a path below the folder of feature pages; None if there is none, or it leads out."""
        if self.server.pages is None or not path.startswith(PAGES) or "\0" in path:
            return None
        try:
            file = (self.server.pages / path.removeprefix(PAGES)).resolve()
            return file if file.is_relative_to(self.server.pages) and file.is_file() else None
        except (OSError, ValueError):  # a name that is too long, a folder that may not be read
            return None

    def _answer(
        self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", *, close: bool = False
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body))} | SAFE
        for name, value in (headers | ({"Connection": "close"} if close else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or close
