"""Names on the hub: what they mean, what they are not, and what is refused with the right form."""

from pathlib import Path

import pytest

from difffract_jax.config import UserError
from difffract_jax.hub.names import HubName, parse_hub_name

COMMIT = "741f7c3ce8b383c54771c7003378a50191e9efe9"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:someone/flux", HubName("someone/flux")),
        ("hf:black-forest-labs/FLUX.1-schnell", HubName("black-forest-labs/FLUX.1-schnell")),
        ("hf:someone/flux@v1.0", HubName("someone/flux", "v1.0")),
        (f"hf:someone/flux@{COMMIT}", HubName("someone/flux", COMMIT)),
        ("hf:someone/flux@refs/pr/12", HubName("someone/flux", "refs/pr/12")),
        ("hf:someone/flux@refs/pr/12/sub", HubName("someone/flux", "refs/pr/12", "sub")),
        ("hf:someone/flux@feature%2Fone/a/b", HubName("someone/flux", "feature/one", "a/b")),
        ("hf:someone/flux/transcoders", HubName("someone/flux", None, "transcoders")),
        ("hf:someone/flux/flux.safetensors", HubName("someone/flux", None, "flux.safetensors")),
    ],
)
def test_a_name_says_repository_revision_and_folder_and_is_written_back(text, name) -> None:
    assert parse_hub_name(text) == name
    assert str(name) == text
    assert parse_hub_name(str(Path(text))) == name  # settings hold some names as paths


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf:flux", "write hf:OWNER/NAME"),
        ("hf:", "write hf:OWNER/NAME"),
        ("hf:someone/flux@", "write hf:OWNER/NAME"),
        ("hf:someone/flux/../other", "write hf:OWNER/NAME"),
        ("hf:some one/flux", "write hf:OWNER/NAME"),
        ("hf:someone/captions:train:text", "would be a data set of prompts"),
        ("hf://someone/flux", "write hf:someone/flux for"),
        ("https://huggingface.co/someone/flux/tree/main", "write hf:someone/flux for"),
        ("https://huggingface.co/datasets/someone/captions", "is not the address of a model"),
    ],
)
def test_what_only_looks_like_a_name_is_refused_with_the_right_form(text, words) -> None:
    with pytest.raises(UserError, match=words):
        parse_hub_name(text)
    with pytest.raises(UserError, match=words):
        parse_hub_name(str(Path(text)))


def test_a_bare_name_is_the_hubs_unless_something_here_could_be_meant(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_hub_name("someone/flux") == HubName("someone/flux")
    for text in ("flux", "./someone/flux", "/someone/flux", "a/b/c", "someone/flux.safetensors", "organism"):
        assert parse_hub_name(text) is None
    (tmp_path / "runs" / "flux").mkdir(parents=True)
    assert parse_hub_name("runs/flux") is None
    assert parse_hub_name("runs/fluks") is None  # a slip in a path does not ask the hub
    assert parse_hub_name("hf:runs/flux") == HubName("runs/flux")


def test_a_slash_at_the_end_means_nothing() -> None:
    assert parse_hub_name("hf:someone/flux/") == HubName("someone/flux")
    assert parse_hub_name("hf:someone/flux@v1/a/") == HubName("someone/flux", "v1", "a")


def test_revision_and_folder_may_stand_beside_the_name() -> None:
    assert parse_hub_name("hf:a/b/c", revision="v1", subfolder="d/") == HubName("a/b", "v1", "c/d")
    assert parse_hub_name("hf:a/b@v1", revision="v1") == HubName("a/b", "v1")
    with pytest.raises(UserError, match="give one of them"):
        parse_hub_name("hf:a/b@v1", revision="v2")
