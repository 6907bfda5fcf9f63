"""The server answers this machine alone, gives the page and its feature pages, and takes groups from the page alone."""

import http.client
import socket
import threading
from pathlib import Path

import pytest

from difffract_jax.config import UserError
from difffract_jax.dashboards.page_server import MOST_BYTES, PageServer


@pytest.fixture
def saved():
    return []


@pytest.fixture
def server(tmp_path, saved):
    folder = tmp_path / "pages"
    (folder / "sub").mkdir(parents=True)
    (folder / "index.html").write_text("an index", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")

    def save(text):
        if "refuse" in text:
            raise UserError("These groups are of another graph.")
        saved.append(text)
        return "Saved."

    made = PageServer(lambda token: f"the page with {token}", save, pages=folder)
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=120)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_gives_the_page_with_a_token_of_its_own(server):
    assert ask(server, "GET", "/") == (200, f"the page with {server.token}")
    assert server.server_address[0] == "127.0.0.1" and server.address.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "path",
    ["/pages/", "/pages", "/pages/sub/", "/pages/../secret.txt", "/pages/%2e%2e/secret.txt", "/pages/..%2fsecret.txt"]
    + [
        "/secret.txt",
        "/pages/link.txt",
        "/pages//etc/passwd",
        "/pages/%00",
        "/groups",
        "/index.html",
        "/pages/" + "x" * 5000,
    ],
)
def test_nothing_else_is_given(server, path):
    assert ask(server, "GET", path)[0] == 404


def test_it_gives_feature_pages(server):
    assert ask(server, "GET", "/pages/index.html?x=1") == (200, "an index")


def test_a_file_that_cannot_be_read_is_one_sentence(server, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the mode of a file holds nobody off who is root
    assert ask(server, "GET", "/pages/index.html") == (403, "index.html cannot be read (Permission denied).")
    monkeypatch.undo()
    assert ask(server, "GET", "/pages/index.html") == (200, "an index")
    assert "Traceback" not in capsys.readouterr().err


def test_groups_are_taken_with_the_token_alone(server, saved):
    assert ask(server, "POST", "/groups", "{}")[0] == 403
    assert ask(server, "POST", "/groups", "{}", **{"X-Token": "wrong"})[0] == 403
    assert ask(server, "POST", "/elsewhere", "{}", **{"X-Token": server.token})[0] == 404
    assert saved == []
    assert ask(server, "POST", "/groups", "{}", **{"X-Token": server.token}) == (200, "Saved.")
    assert saved == ["{}"]


def test_groups_are_refused_with_a_sentence(server, saved):
    token = {"X-Token": server.token}
    assert ask(server, "POST", "/groups", "refuse", **token) == (400, "These groups are of another graph.")
    assert ask(server, "POST", "/groups", b"\xff", **token)[0] == 400
    assert ask(server, "POST", "/groups", b"", **token | {"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    assert ask(server, "POST", "/groups", b"", **token | {"Content-Length": "-1"})[0] == 413
    assert ask(server, "POST", "/groups", b"", **token | {"Content-Length": "9" * 5000})[0] == 413
    assert saved == []


def test_another_name_for_this_machine_is_refused(server):
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    assert ask(server, "POST", "/groups", "{}", Host="evil.example", **{"X-Token": server.token})[0] == 403


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port} of this machine cannot be listened on .*; leave --port out"):
            PageServer(str, str, port=port)
