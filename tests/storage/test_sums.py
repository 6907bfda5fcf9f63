"""Hashes of a directory: written, checked, and readable for `sha256sum`."""

import hashlib
import re

import pytest

from difffract_jax.config import UserError
from difffract_jax.storage.sums import SUMS, check_sums, write_sums


@pytest.fixture
def home(tmp_path):
    """A directory with hashes."""
    (tmp_path / "part" / "deep").mkdir(parents=True)
    (tmp_path / "model.bin").write_bytes(bytes(range(256)))
    (tmp_path / "part" / "deep" / "two words.json").write_text("{}\n")
    (tmp_path / "part" / "empty").write_bytes(b"")
    write_sums(tmp_path)
    return tmp_path


def test_what_was_written_passes(home):
    check_sums(home)


def test_the_file_is_in_the_format_of_sha256sum(home):
    lines = (home / SUMS).read_text().splitlines()
    assert all(re.fullmatch(r"[0-9a-f]{64}  \S.*", line) for line in lines)
    named = dict(line.split("  ", 1)[::-1] for line in lines)
    assert list(named) == ["model.bin", "part/deep/two words.json", "part/empty"]
    assert named["model.bin"] == hashlib.sha256(bytes(range(256))).hexdigest()


def test_writing_again_changes_nothing(home):
    before = (home / SUMS).read_bytes()
    write_sums(home)
    assert (home / SUMS).read_bytes() == before


def test_a_changed_and_a_missing_file_are_named_in_one_sentence(home):
    content = bytearray((home / "model.bin").read_bytes())
    content[17] ^= 1
    (home / "model.bin").write_bytes(content)
    (home / "part" / "deep" / "two words.json").unlink()
    with pytest.raises(UserError) as caught:
        check_sums(home)
    message = str(caught.value)
    assert "model.bin differs; part/deep/two words.json is missing, against SHA256SUMS" in message
    assert "part/empty" not in message and "\n" not in message


def test_a_file_that_became_a_directory_is_missing(home):
    (home / "part" / "empty").unlink()
    (home / "part" / "empty").mkdir()
    with pytest.raises(UserError, match="part/empty is missing"):
        check_sums(home)


def test_files_that_are_not_listed_do_not_matter(home):
    (home / "notes.txt").write_text("mine")
    check_sums(home)


def test_a_directory_without_hashes_passes(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"anything")
    check_sums(tmp_path)
