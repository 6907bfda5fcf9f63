"""Prompt files: encodings, line ends, columns, and what is no text, each told by its place."""

import json
import logging
import os
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from difffract_jax.cli.settings import SteerConfig
from difffract_jax.config import GenerateConfig, UserError, resolve
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.transcoders.prompts import read_prompts, split_prompts

EXOTIC = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg"
"""Characters at which `str.splitlines` ends a line."""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-marked", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_every_encoding_with_a_mark_and_every_line_end_is_read(tmp_path, encoding, end, kind):
    prompts = ["a red fox", EXOTIC, "\u72d0 \U0001f98a"]
    lines = prompts if kind == "txt" else [json.dumps({"prompt": one}, ensure_ascii=False) for one in prompts]
    text = end.join(lines) + end
    marked = encoding.removesuffix("-marked")
    raw = text.encode(marked) if marked == encoding else "\ufeff".encode(marked) + text.encode(marked)
    path = tmp_path / f"prompts.{kind}"
    path.write_bytes(raw)
    assert read_prompts(str(path)) == prompts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b'{"prompt": "a"}\n{"prompt": "\\ud83d fox"}\n',
            r"Line 2 of .* not valid Unicode: it holds '\\ud83d'",
        ),
        (b'"a"\n\n["b"]\n', "Line 3 of .* must be text, but is a list"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "Line 2 of .* must be text, but is a number"),
        (b'"a fox"\n"caf\xe9"\n', "Line 2 of .* is not UTF-8 text; save the file as UTF-8"),
        (b"[" * 100_000, "Line 1 of .* is not valid JSON"),
    ],
)
def test_a_line_of_jsonl_that_is_no_prompt_is_named(tmp_path, content, told):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(str(tmp_path / "a.jsonl"))


def test_marks_within_a_file_that_was_joined_are_left_out(tmp_path):
    for name, one in (("a.txt", "a fox\n"), ("a.jsonl", '"a fox"\n')):
        (tmp_path / name).write_bytes(2 * one.encode("utf-8-sig"))
        assert read_prompts(str(tmp_path / name)) == ["a fox", "a fox"]


def test_halves_of_characters_that_belong_together_are_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a \\ud83e\\udd8a"}\n')
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["a \U0001f98a"]


BROKEN = {
    "a\ud83d fox": r"half of a character, as a broken JSON escape leaves it; write the character itself",
    os.fsdecode(b"caf\xc3"): r"the byte 0xc3, which the locale does not decode; set LC_ALL=C.UTF-8 or PYTHONUTF8=1",
}


@pytest.mark.parametrize("prompt", BROKEN)
def test_a_prompt_with_a_lone_surrogate_is_refused_before_any_tokenizer_sees_it(prompt):
    with pytest.raises(UserError, match=f"The prompt is not valid Unicode: it holds .*{BROKEN[prompt]}"):
        encode_prompt(random_pipeline().tokenizers, prompt, 8)
    with pytest.raises(UserError, match=f"Prompt 2 is not valid Unicode: it holds .*{BROKEN[prompt]}"):
        split_prompts(["a fox", prompt], 0.5, 0)
    with pytest.raises(UserError, match=f"`prompt` was .*it holds .*{BROKEN[prompt]}"):
        resolve(GenerateConfig, {"model": "m", "prompt": prompt})
    given = {"model": "m", "transcoders": "t", "prompt": "p", "edit": ("img/0/f1=zero",)}
    with pytest.raises(UserError, match=f"`expect` was .*it holds .*{BROKEN[prompt]}"):
        resolve(SteerConfig, given | {"expect": prompt})
    # Paths are bytes to the system, whatever the locale: they are kept.
    assert str(resolve(GenerateConfig, {"model": prompt, "prompt": "p", "out": f"{prompt}.png"}).out) == f"{prompt}.png"


def test_files_of_every_kind_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\n  a \u00fcber-lemon \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": "a fox", "id": 3}) + "\n" + json.dumps("a lemon") + "\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a fox", "a \u00fcber-lemon"]
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["a fox", "a lemon"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"\n \n", "holds no prompts"),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\x00", "is binary, no text"),
        ("utf-16-without-mark.txt", "a fox".encode("utf-16-le"), "is binary, no text.* in UTF-8"),
        ("zeros.txt", b"a\x00b\n", "is binary, no text"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "Line 2 of .* is not valid JSON"),
        ("fields.jsonl", b'{"title": "a"}\n', "Line 1 of .* has no field prompt, caption, text"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(str(tmp_path / name))


def test_missing_files_and_extras_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no.txt is not a file of prompts"):
        read_prompts(str(tmp_path / "no.txt"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module, source in (("pyarrow.parquet", tmp_path / "a.parquet"), ("datasets", "hf:someone/captions")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"Reading {source} needs the extra `data`"):
            read_prompts(str(source))


def test_parquet_files_are_read_and_broken_ones_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "caption": ["a fox", None, " a lemon"]}), path)
    assert read_prompts(str(path)) == ["a fox", "a lemon"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet \(.*\); write or copy the file again"):
        read_prompts(str(path))
    parquet.write_table(pyarrow.table({"title": ["a fox"]}), path)
    with pytest.raises(UserError, match="has the columns title; one must be prompt, caption, text"):
        read_prompts(str(path))


class Columns(dict):
    """What `datasets.load_dataset` returns, as far as it is read."""

    column_names = property(list)


def test_datasets_are_read_and_missing_ones_told(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the Hub")
        return Columns(title=["x", "y"], text=["a fox", "a lemon"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("hf:someone/captions") == ["a fox", "a lemon"]
    assert read_prompts("hf:someone/captions:test:title") == ["x", "y"]
    assert asked == [("someone/captions", "train"), ("someone/captions", "test")]
    with pytest.raises(UserError, match=r"The dataset no/such could not be read \(Dataset 'no/such' doesn't exist on"):
        read_prompts("hf:no/such")
    for model in ("hf:someone/flux@main", "hf:someone/flux/transcoders"):
        with pytest.raises(UserError, match="is written like a model on the hub; a data set of prompts is"):
            read_prompts(model)
    monkeypatch.setattr(Columns, "column_names", ["title"])
    with pytest.raises(UserError, match="has the columns title; write hf:someone/captions:train:COLUMN"):
        read_prompts("hf:someone/captions")


def table(tmp_path, columns, name="a.parquet", **more):
    parquet.write_table(pyarrow.table(columns), tmp_path / name, **more)
    return str(tmp_path / name)


WORDS = ["a fox", "a lemon", "caf\u00e9 \u72d0"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_binary()),
    ],
    ids=str,
)
def test_parquet_columns_of_every_type_of_text_are_read(tmp_path, kind):
    value_type = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    column = pyarrow.array([one.encode() for one in WORDS], pyarrow.binary()).cast(pyarrow.string()).cast(value_type)
    if value_type != kind:
        column = column.dictionary_encode().cast(kind)
    assert read_prompts(table(tmp_path, {"url": [1, 2, 3], "caption": column})) == WORDS


@pytest.mark.parametrize("name", ["TEXT", "Caption", "pRoMpT"])
def test_columns_and_fields_are_found_in_capitals_too(tmp_path, name):
    assert read_prompts(table(tmp_path, {"url": ["x"] * 3, name: WORDS})) == WORDS
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, name: one}) for one in WORDS), encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.jsonl")) == WORDS


def test_a_column_can_be_named(tmp_path, monkeypatch):
    path = table(tmp_path, {"text": ["x", "y", "z"], "Alt.Text: long": WORDS, "alt": ["1", "2", "3"]})
    assert read_prompts(f"{path}:Alt.Text: long") == read_prompts(f"{path}:alt.text: LONG") == WORDS
    assert read_prompts(path) == ["x", "y", "z"]
    upper = table(tmp_path, {"a": WORDS}, "B.PARQUET")
    assert read_prompts(f"{upper}:a") == WORDS
    (tmp_path / "c.jsonl").write_text('{"text": "x", "alt": "y"}', encoding="utf-8")
    assert read_prompts(f"{tmp_path / 'c.jsonl'}:alt") == ["y"]
    with pytest.raises(UserError, match="has the columns text, Alt.Text: long, alt; 'none' is not one of them"):
        read_prompts(f"{path}:none")
    with pytest.raises(UserError, match="Line 1 of .* has no field none"):
        read_prompts(f"{tmp_path / 'c.jsonl'}:none")
    with pytest.raises(UserError, match="no.parquet:alt is not a file of prompts"):
        read_prompts(f"{tmp_path / 'no.parquet'}:alt")


def test_files_whose_names_hold_colons_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.parquet:text", "c:d.parquet", "x.parquet:y.parquet"):
        table(tmp_path, {"text": [name], "other": ["o"]}, name)
    (tmp_path / "a.parquet:text").rename(tmp_path / "a.parquet:text.txt")
    (tmp_path / "a.parquet:text.txt").write_text("from the file", encoding="utf-8")
    assert read_prompts("a.parquet:text.txt") == ["from the file"]
    assert read_prompts("c:d.parquet") == ["c:d.parquet"] and read_prompts("c:d.parquet:other") == ["o"]
    assert read_prompts("x.parquet:y.parquet:other") == ["o"]


def test_null_and_empty_captions_are_left_out_and_counted(tmp_path, caplog):
    path = table(tmp_path, {"caption": ["a fox", None, "", "  ", " a lemon"]})
    with caplog.at_level(logging.WARNING):
        assert read_prompts(path) == read_prompts(path) == ["a fox", "a lemon"]
        (tmp_path / "a.jsonl").write_text('{"text": null}\n\n"a fox"\n', encoding="utf-8")
        assert read_prompts(str(tmp_path / "a.jsonl")) == ["a fox"]
    assert caplog.messages == [
        f"{path}: 3 of 5 prompts are null or empty and are left out.",
        f"{tmp_path / 'a.jsonl'}: 1 of 2 prompts are null or empty and are left out.",
    ]
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(table(tmp_path, {"caption": pyarrow.nulls(3)}))


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"caption": [["a", "b"]]},
            r"Column caption of .* must be text, but is list<\w+: string>; name another",
        ),
        ({"Text": [3]}, "Column Text of .* must be text, but is int64"),
        ({"text": [{"en": "a"}]}, r"Column text of .* must be text, but is struct<en: string>"),
        ({"text": [b"a", b"caf\xe9"]}, "Row 2 of column text of .* is not UTF-8 text"),
        ({"TEXT": ["a"], "Text": ["b"]}, "has the columns TEXT, Text; one must be prompt, caption, text. Name one as"),
    ],
)
def test_columns_that_are_not_text_are_named_with_their_type(tmp_path, columns, told):
    with pytest.raises(UserError, match=told):
        read_prompts(table(tmp_path, columns))
