"""Text files: what a byte order mark announces, where lines end, and settings in every encoding."""

import pytest

from difffract_jax.config import GenerateConfig, UserError, resolve
from difffract_jax.text_files import decoded, lines_of, unicode_problem


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a\r\nb\rc\n", ["a", "b", "c"]),
        ("a\x0b\x0c\x1c\x85\u2028\u2029b", ["a\x0b\x0c\x1c\x85\u2028\u2029b"]),
    ],
)
def test_lines_end_at_line_feeds_and_carriage_returns_alone(text, lines):
    assert lines_of(text) == lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_settings_are_read_in_every_encoding_that_says_which_it_is(tmp_path, encoding):
    file = tmp_path / "settings.yaml"
    for content in ("model: m\nprompt: un caf\u00e9 \u72d0\n", '{"model": "m", "prompt": "un caf\u00e9 \u72d0"}'):
        file.write_bytes(content.encode(encoding))
        assert resolve(GenerateConfig, file=file).prompt == "un caf\u00e9 \u72d0"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"model: m\nprompt: caf\xe9\n", "settings.yaml is not text in UTF-8; save it in that encoding"),
        (b'model: m\nprompt: "a \\ud83d fox"\n', r"`prompt` was .*, but it holds '\\ud83d', half of a character"),
    ],
)
def test_settings_that_are_no_text_are_refused(tmp_path, content, told):
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(UserError, match=told):
        resolve(GenerateConfig, file=tmp_path / "settings.yaml")


def test_bytes_that_break_their_mark_are_no_text():
    for raw in (b"\xff\xfea", b"\xef\xbb\xbf\xff", b"\x80"):
        with pytest.raises(UnicodeDecodeError):
            decoded(raw)
    assert unicode_problem("a \U0001f98a \ufffd \ue000") is None
