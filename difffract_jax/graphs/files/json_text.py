"""JSON files of other tools: their text in whatever encoding, and their entries held against a table of fields.

1. `load_json` reads a file: UTF-8, UTF-16 and UTF-32, with a byte order mark or without, gzipped or not. Halves of
   characters, as broken escapes leave them, become U+FFFD.
2. `wrong_field` finds the first field of an entry that is missing, or not of its type.

Python's JSON has numbers that JSON has not, NaN and Infinity; `is_number` leaves them out, and what float32 cannot
hold.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.text_files import unicode_replaced

GZIP = b"\x1f\x8b"
TEXT, INTEGER, NUMBER, LIST, OBJECT = "text", "a whole number", "a number", "a list", "an object"
TYPES: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    INTEGER: (int,),
    NUMBER: (int, float),
    LIST: (list,),
    OBJECT: (dict,),
}
"""What a field may hold, as messages call it, and Python's types of that."""
_HALF = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""What JSON with lone surrogates has in it, as they are or escaped."""
_LARGEST = float(np.finfo(np.float32).max)


def load_json(path: Path) -> Any:
    """Reads a JSON file.

    Args:
        path: the file, gzipped or not.

    Raises:
        UserError: saying what the file is instead, or where its text is wrong.
    """
    content = path.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"{path} is a damaged gzip file; download or copy it again.") from None
    if not content.strip():
        raise UserError(f"{path} is not a graph file: it is empty; export the graph again.")
    try:
        # Of bytes, Python's reader finds the encoding by their mark, or by where the zeros stand.
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        document = json.loads(text)
        return _whole_characters(document) if _HALF.search(text) else document
    except (ValueError, RecursionError) as error:
        raise UserError(_not_json(path, content, error)) from None


def _whole_characters(value: Any) -> Any:
    """Returns a JSON value with U+FFFD for lone surrogates, halves of characters that no file of ours can hold."""
    if isinstance(value, str):
        return unicode_replaced(value)
    if isinstance(value, list):
        return [_whole_characters(entry) for entry in value]
    if isinstance(value, dict):
        return {_whole_characters(name): _whole_characters(entry) for name, entry in value.items()}
    return value


def _not_json(path: Path, content: bytes, error: Exception) -> str:
    """Says what a file is that could not be read as JSON."""
    if isinstance(error, json.JSONDecodeError) and content.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1] in b"{[":
        return f"{path} is not readable as JSON ({error}); it may be cut off: download or export the graph again."
    return (
        f"{path} is not a graph file: it begins with {content[:16]!r}, so that it is neither an .npz file nor JSON; "
        "give a graph that difffract, the reference, circuit-tracer or Neuronpedia wrote."
    )


def json_kind(value: Any) -> str:
    """Returns what a JSON value is, as people call it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return next(name for name, types in TYPES.items() if name != INTEGER and isinstance(value, types))


def is_number(value: Any) -> bool:
    """Says whether a JSON value is a finite number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def wrong_field(entry: Any, table: Mapping[str, tuple[str, ...]], what: str) -> str | None:
    """Returns what is wrong with an entry of a document, None if nothing is.

    Args:
        entry: a JSON value that should be an object.
        table: name of a field -> what it may hold, names of `TYPES` or "null"; one that may be missing has
            "missing" too.
        what: to call the entry.
    """
    if not isinstance(entry, dict):
        return f"{what} is {json_kind(entry)} instead of an object"
    for name, forms in table.items():
        if name not in entry:
            if "missing" not in forms:
                return f"{what} has no {name}, in {json.dumps(entry)[:100]}"
            continue
        value = entry[name]
        if (value is None and "null" in forms) or _is_one_of(value, forms):
            continue
        wanted = " or ".join(form for form in forms if form != "missing")
        return f"{what} has the {name} {json.dumps(value)[:40]} instead of {wanted}, in {json.dumps(entry)[:100]}"
    return None


def _is_one_of(value: Any, forms: tuple[str, ...]) -> bool:
    return any(isinstance(value, TYPES.get(form, ())) and not isinstance(value, bool) for form in forms)
