"""JSON is read in every encoding that tools write, and anything else is called what it is."""

import gzip
import json

import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs.files.json_text import is_number, load_json, wrong_field

VALUE = {"nodes": [1], "name": "café 狐"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_encoding_is_read(tmp_path, encoding, pack):
    (tmp_path / "g").write_bytes(pack(json.dumps(VALUE, ensure_ascii=False).encode(encoding)))
    assert load_json(tmp_path / "g") == VALUE


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not a graph file: it is empty"),
        (b" \n", "is not a graph file: it is empty"),
        (b'{"nodes": [', "is not readable as JSON .*; it may be cut off"),
        ('{"nodes": ['.encode("utf-16"), "is not readable as JSON"),
        (b"<!DOCTYPE html>", "is not a graph file: it begins with b'<!DOCTYPE html>', so that it is neither"),
        (b"\x89PNG\r\n\x1a\n", "is not a graph file: it begins with b'.x89PNG"),
        (gzip.compress(b"{}" * 100, mtime=0)[:-9], "is a damaged gzip file"),
        (b"\x1f\x8bnothing", "is a damaged gzip file"),
        (b"[" * 200_000, "is not "),
    ],
)
def test_anything_else_is_called_what_it_is(tmp_path, content, told):
    (tmp_path / "g.json").write_bytes(content)
    with pytest.raises(UserError, match=f"g.json {told}"):
        load_json(tmp_path / "g.json")


def test_numbers_are_those_that_a_graph_can_hold():
    assert all(map(is_number, (0, -1.5, 3e38, 10**30)))
    assert not any(map(is_number, (float("nan"), float("inf"), 1e39, 10**400, True, None, "1")))


def test_the_first_wrong_field_is_named():
    table = {"a": ("text",), "b": ("a number", "null", "missing")}
    assert wrong_field({"a": "x"}, table, "it") is None and wrong_field({"a": "x", "b": None}, table, "it") is None
    assert wrong_field([1], table, "it") == "it is a list instead of an object"
    assert wrong_field({"b": 1}, table, "it") == 'it has no a, in {"b": 1}'
    assert wrong_field({"a": "x", "b": "y"}, table, "it").startswith('it has the b "y" instead of a number or null')
