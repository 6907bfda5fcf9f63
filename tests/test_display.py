"""Whatever an object holds, it shows itself in few short lines, and HTML holds nothing that a browser would run."""

from dataclasses import dataclass

import numpy as np
import pytest

from difffract_jax.display import (
    arrays_text,
    hash_text,
    html_of,
    html_table,
    number_text,
    one_line,
    record_text,
    size_text,
    spans,
    text_of,
    text_table,
)

HOSTILE = "<b>&\n" * 50


def test_facts_stand_one_a_line_under_a_title():
    assert text_of("a title", {"one": 1, "longer": "x\ny", "none": None, "empty": ""}) == (
        "a title\n  one     1\n  longer  x y"
    )
    lines = text_of(HOSTILE, {"a": HOSTILE, "b": HOSTILE}).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 100


def test_a_table_is_aligned_and_cut():
    rows = [(f"row {i}", i / 3) for i in range(12)]
    lines = text_table("rows", ("name", "share"), rows).splitlines()
    assert lines[:3] == ["rows", "name   share", "row 0  0"] and lines[-1] == "... and 2 more" and len(lines) == 13
    assert text_table("none", ("name",), []).splitlines() == ["none", "name"]


@pytest.mark.parametrize(
    "page", [html_of(HOSTILE, {HOSTILE: HOSTILE}), html_table(HOSTILE, (HOSTILE,), [(HOSTILE,)] * 20)]
)
def test_html_is_escaped(page):
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page
    assert page.startswith("<table>") and page.endswith("</table>")


def test_numbers_hashes_and_sizes_are_short():
    assert [number_text(value) for value in (None, 1 / 3, 7, "a")] == ["-", "0.3333", "7", "a"]
    assert [hash_text(value) for value in (None, "", "made:0", "a" * 64)] == ["unknown"] * 2 + [
        "made:0",
        "a" * 12 + "...",
    ]
    sizes = (0, 1, 1023, 1024, 1536, 2**20, 3 * 2**30, 2**40, 5 * 2**60)
    assert [size_text(size) for size in sizes] == [
        *("0 B", "1 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "3.0 GiB", "1.0 TiB", "5242880.0 TiB")
    ]
    assert one_line("a" * 10, 10) == "a" * 10 and one_line("a" * 11, 10) == "a" * 7 + "..."


def test_a_record_stands_on_one_line():
    @dataclass(repr=False)
    class Kept:
        text: str
        numbers: tuple[int, ...]
        few: tuple[int, ...] = (1, 2)

        __repr__ = record_text

    assert repr(Kept("a" * 99, tuple(range(99)))) == f"Kept(text='{'a' * 36}..., numbers=<99 entries>, few=(1, 2))"


def test_spans_of_numbers():
    assert [spans(numbers) for numbers in ((), (3,), (0, 1, 2, 5), (1, 3, 4))] == ["", "3", "0-2,5", "1,3-4"]


def test_arrays_come_to_numbers_types_and_bytes():
    arrays = [np.zeros((2, 3), np.float32), np.zeros(4, np.float32), np.zeros(1, bool), None, "text"]
    assert arrays_text(arrays) == "10 float32, 1 bool; 41 B" and arrays_text([]) == "no numbers; 0 B"
