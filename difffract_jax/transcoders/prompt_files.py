"""Prompts from files: text, JSONL, Parquet, and Hugging Face datasets.

1. A text file has one prompt a line; a JSONL file a string a line, or an object with a field for the prompt; a Parquet
   file or a dataset has a column of prompts.
2. The field or column is the first of `COLUMNS` that there is, in capitals or not, unless `FILE:COLUMN` names one.
3. What is null or empty is left out, and counted. What is not text is refused with its line, row or column.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import is_remote, spelled
from difffract_jax.storage.remote.cache import local_file
from difffract_jax.text_files import decoded, lines_of, unicode_problem

COLUMNS = ("prompt", "caption", "text")
"""Names under which a JSONL file, a Parquet file or a dataset may hold its prompts."""
_REMOTE_FILE = re.compile(r"(.+\.(?:txt|jsonl|parquet))(?::(.+))?", re.IGNORECASE)
_BEFORE_COLUMN = re.compile(r"\.(?:parquet|jsonl):", re.IGNORECASE)
_WORDS = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}


def read_prompts(source: str) -> list[str]:
    """Reads prompts, without white space around them.

    Args:
        source: path, here or in a bucket, of a `.txt`, `.jsonl` or `.parquet` file, the last two with `:COLUMN` behind
            them if wanted, or `hf:OWNER/NAME[:SPLIT[:COLUMN]]`.

    Raises:
        UserError: if there is nothing to read, or it is not text.
    """
    if source.startswith("hf:"):
        return _without_empty(source, _dataset_values(source))
    path, column = _file_and_column(source)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _without_empty(source, _parquet_values(path, column))
    # Files that were joined have a mark where the second began, which would be part of a prompt.
    lines = [line.lstrip("\ufeff") for line in lines_of(_text(path))]
    if kind == ".jsonl":
        numbered = ((f"Line {number} of {path}", line) for number, line in enumerate(lines, 1) if line.strip())
        return _without_empty(source, [_field(where, line, column) for where, line in numbered])
    return _without_empty(source, [line for line in lines if line.strip()])


def _file_and_column(source: str) -> tuple[Path, str | None]:
    """Splits FILE:COLUMN; a file that exists under the whole name is that file."""
    if is_remote(source):
        return _remote_file_and_column(source)
    ends = [match.end() for match in _BEFORE_COLUMN.finditer(source)]
    for path, column in ((source, None), *((source[: end - 1], source[end:]) for end in ends)):
        if Path(path).is_file():
            return Path(path), column
    raise UserError(f"{source} is not a file of prompts; give a .txt, .jsonl or .parquet file, or hf:OWNER/NAME.")


def _remote_file_and_column(source: str) -> tuple[Path, str | None]:
    """Splits FILE:COLUMN of a file in a bucket, whose name ends in one of the suffixes that are read."""
    match = _REMOTE_FILE.fullmatch(source)
    if match is None:
        raise UserError(f"{spelled(source)} is not a file of prompts; give a .txt, .jsonl or .parquet file.")
    return local_file(match[1]), match[2]


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = decoded(raw)
    except UnicodeDecodeError as error:
        if b"\0" not in raw:
            line = len(lines_of(raw[: error.start].decode("latin-1") + "."))
            raise UserError(f"Line {line} of {path} is not UTF-8 text; save the file as UTF-8.") from None
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is binary, no text; give one prompt a line, JSONL or Parquet, in UTF-8.")
    return text


def _without_empty(source: str, values: Sequence[str | None]) -> list[str]:
    """Returns the prompts that are there, and tells how many are not."""
    prompts = [value.strip() for value in values if value is not None and value.strip()]
    if not prompts:
        raise UserError(f"{source} holds no prompts; give one prompt a line, or a column {', '.join(COLUMNS)}.")
    if len(prompts) < len(values):
        _warn_once(
            f"{source}: {len(values) - len(prompts)} of {len(values)} prompts are null or empty and are left out."
        )
    return prompts


@cache
def _warn_once(sentence: str) -> None:
    """Logs a sentence once: both splits read the same file."""
    logging.getLogger(__name__).warning(sentence)


def _as_text(where: str, value: Any) -> str | None:
    """Returns a value as text, None for null; refuses what is neither, by its place."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8 text; write the file again, or leave this prompt out.") from None
    if value is not None and not isinstance(value, str):
        kind = _WORDS.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{where} must be text, but is {kind}; name another column, or change it.")
    problem = None if value is None else unicode_problem(value)
    if problem:
        raise UserError(f"{where} is not valid Unicode: it {problem}.")
    return value


def _named(names: Iterable[str], column: str | None) -> str | None:
    """Returns the name of the column that holds prompts; None if there is none, or several differ in capitals alone."""
    names = list(names)
    for wanted in COLUMNS if column is None else (column,):
        alike = [name for name in names if name.lower() == wanted.lower()]
        fitting = [name for name in alike if name == wanted] or alike
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def _field(where: str, line: str, column: str | None) -> str | None:
    """Returns the prompt of a line of JSONL."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not valid JSON; give one object or string a line.") from None
    if not isinstance(record, dict):
        return _as_text(where, record)
    name = _named(record, column)
    if name is None:
        wanted = ", ".join(COLUMNS) if column is None else column
        raise UserError(f"{where} has no field {wanted}; give it one, or name another as FILE.jsonl:FIELD.")
    return _as_text(where, record[name])


def _extra(module: str, what: str) -> Any:
    """Imports a module of the extra `data`."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs the extra `data`; install it with pip install 'difffract_jax[data]'.") from None


def _parquet_values(path: Path, column: str | None) -> list[str | None]:
    """Reads the column of prompts of a Parquet file, and no other."""
    parquet, arrow = (_extra(module, f"Reading {path}") for module in ("pyarrow.parquet", "pyarrow"))
    # An open file, since pyarrow takes some names with a colon for addresses.
    with _pyarrow_errors_named(path, arrow), path.open("rb") as raw, parquet.ParquetFile(raw) as file:
        schema = file.schema_arrow
        name = _named(schema.names, column)
        if name is None:
            wanted = f"one must be {', '.join(COLUMNS)}" if column is None else f"{column!r} is not one of them"
            raise UserError(
                f"{path} has the columns {', '.join(schema.names)}; {wanted}. Name one as FILE.parquet:COLUMN."
            )
        kind = schema.field(name).type
        stored = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if not _holds_text(arrow.types, stored):
            raise UserError(
                f"Column {name} of {path} must be text, but is {kind}; name another as FILE.parquet:COLUMN."
            )
        values = file.read(columns=[name]).column(name).cast(stored)
    return list(_column_texts(arrow, values, f"of column {name} of {path}"))


@contextmanager
def _pyarrow_errors_named(path: Path, arrow: Any) -> Iterator[None]:
    """Turns pyarrow's errors on a file that is not Parquet, or cut off, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as Parquet ({said}); write or copy the file again.") from None


def _holds_text(types: Any, kind: Any) -> bool:
    """Says whether a type of pyarrow's is one of text, of bytes that may be text, or of nulls alone."""
    names = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{name}")(kind) for name in (*names, "null"))


def _column_texts(arrow: Any, values: Any, where: str) -> Iterator[str | None]:
    """Yields the texts of a column; by way of bytes, as Parquet does not say whether strings are valid UTF-8."""
    if not arrow.types.is_null(values.type):
        values = values.cast(arrow.large_binary())
    for number, value in enumerate(values.to_pylist(), 1):
        yield _as_text(f"Row {number} {where}", value)


def _dataset_values(source: str) -> list[str | None]:
    given = source.removeprefix("hf:").split(":")
    name, split, column = (*given, *("", "train", "")[len(given) :])[:3]
    if "@" in name or name.count("/") > 1:
        raise UserError(
            f"{source} is written like a model on the hub; a data set of prompts is hf:OWNER/NAME[:SPLIT[:COLUMN]], "
            "without revision or folder."
        )
    datasets = _extra("datasets", f"Reading {source}")
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The dataset {name} could not be read ({' '.join(str(error).split())[:200]}).") from None
    chosen = _named(rows.column_names, column or None)
    if chosen is None:
        raise UserError(f"{source} has the columns {', '.join(rows.column_names)}; write hf:{name}:{split}:COLUMN.")
    return [_as_text(f"Row {number} of column {chosen} of {source}", v) for number, v in enumerate(rows[chosen], 1)]
