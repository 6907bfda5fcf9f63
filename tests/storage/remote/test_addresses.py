"""Remote paths: how they are written, what `Path` makes of them, and what is refused."""

from pathlib import Path

import pytest

from difffract_jax.config import UserError
from difffract_jax.storage.remote.addresses import Address, is_remote, parse_address, spelled
from difffract_jax.storage.remote.cache import refuse_remote


@pytest.mark.parametrize("text", ["gs://bucket/a/b.npz", "gs:/bucket/a/b.npz", "gs://bucket//a/b.npz/"])
def test_a_path_is_read_as_it_is_written_and_as_path_leaves_it(text: str) -> None:
    assert parse_address(text) == parse_address(Path(text)) == Address("gs", "bucket", "a/b.npz")
    assert str(parse_address(Path(text))) == "gs://bucket/a/b.npz" and is_remote(Path(text))


def test_other_paths_are_local() -> None:
    assert not any(map(is_remote, ["graph.npz", "./gs", "/gs/bucket", "C:/x", "hf:owner/name", "az://x/y", "gs", ""]))


def test_texts_get_their_slash_back() -> None:
    told = f"{Path('gs://a-b/c')} and {Path('s3://d/e')} but tags:/x and gs://f/g"
    assert spelled(told) == "gs://a-b/c and s3://d/e but tags:/x and gs://f/g"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gs://", "names no bucket; write gs://BUCKET/PATH"),
        ("s3:/", "names no bucket; write s3://BUCKET/PATH"),
        ("gs://My Bucket/x", "'My Bucket' in gs://My Bucket/x is not a possible name of a bucket"),
        ("s3://bucket/a/../b", "holds '.' or '..' as a folder"),
    ],
)
def test_what_names_no_place_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_address(text)


def test_paths_that_must_be_local_are_told_so() -> None:
    refuse_remote("run", "--out")
    with pytest.raises(UserError, match="--out must lie on this machine, but got gs://bucket/run; name a path here"):
        refuse_remote(Path("gs://bucket/run"), "--out")
