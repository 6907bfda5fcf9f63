"""Text as editors and shells hand it over: byte order marks, line ends, and characters that are none.

1. `decoded` reads UTF-8, or what a byte order mark at the beginning says: Windows writes one.
2. `lines_of` ends lines at LF, CRLF and CR alone. `str.splitlines` also does at U+2028, form feeds and others, which
   JSON strings and captions may hold.
3. `unicode_problem` finds lone surrogates: halves of characters, which no tokenizer takes. Python makes them of broken
   JSON escapes, and of the command line's bytes that the locale cannot decode. `unicode_replaced` takes them out.

No imports of this package, so that settings too can be read through it.
"""

import codecs
import re

MARKS = (
    # UTF-32's little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, and the encoding that each announces."""
_LINE_END = re.compile(r"\r\n|\n|\r")
_SURROGATE = re.compile("[\ud800-\udfff]")


def decoded(raw: bytes) -> str:
    """Decodes the content of a file: UTF-8, or as its byte order mark says, which is left out.

    Args:
        raw: the bytes.

    Raises:
        UnicodeDecodeError: if they are not text of that encoding.

    Example:
        >>> decoded(b"\\xef\\xbb\\xbfa fox"), decoded("a fox".encode("utf-16"))
        ('a fox', 'a fox')
    """
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    return raw.decode(encoding)


def lines_of(text: str) -> list[str]:
    """Splits a text at LF, CRLF and CR; a line end at its end begins no further line.

    Args:
        text: the text.

    Example:
        >>> lines_of("a\\r\\nb\\u2028c\\n")
        ['a', 'b\\u2028c']
    """
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def unicode_problem(text: str) -> str | None:
    """Returns what is wrong with a text that is not valid Unicode and what to do, to follow "it"; None if nothing is.

    Args:
        text: any string of Python.

    Example:
        >>> unicode_problem("a fox")
        >>> unicode_problem("a \\ud83d fox")
        "holds '\\\\ud83d', half of a character, as a broken JSON escape leaves it; write the character itself"
    """
    match = _SURROGATE.search(text)
    if match is None:
        return None
    if "\udc80" <= match[0] <= "\udcff":
        return (
            f"holds the byte 0x{ord(match[0]) - 0xDC00:02x}, which the locale does not decode; "
            "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
        )
    return f"holds {match[0]!r}, half of a character, as a broken JSON escape leaves it; write the character itself"


def unicode_replaced(text: str) -> str:
    """Returns a text with U+FFFD in place of every lone surrogate.

    Args:
        text: any string of Python.

    Example:
        >>> unicode_replaced("a \\ud83d fox") == "a \\ufffd fox"
        True
    """
    return _SURROGATE.sub("\ufffd", text)
