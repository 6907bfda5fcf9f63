"""Files of repositories, from a stand-in hub through the real client: what is downloaded, and every fault."""

import errno
import shutil
import sys
from collections import namedtuple

import pytest
from huggingface_hub import constants

from difffract_jax.config import UserError
from difffract_jax.hub.names import HubName
from difffract_jax.hub.repository import fetch, open_repository
from hub_server import TOKEN

NAME = HubName("someone/model")
LARGE = bytes(range(256)) * 100
FILES = {"config.json": b"{}", "weights/a.safetensors": LARGE, "weights/b.safetensors": LARGE[::-1], "notes.md": b"#"}
WEIGHTS = ["weights/a.safetensors", "weights/b.safetensors"]
USAGE = namedtuple("usage", "total used free")


def get(name: HubName = NAME, paths=tuple(WEIGHTS)):
    """Fetches files, and returns their contents and the folder."""
    folder = fetch(open_repository(name), list(paths))
    return {path: (folder / path).read_bytes() for path in paths}, folder


def sentence(name: HubName = NAME, paths=tuple(WEIGHTS)) -> str:
    """Returns what is told when files cannot be fetched: one line."""
    with pytest.raises(UserError) as told:
        get(name, paths)
    assert "\n" not in str(told.value)
    return str(told.value)


def leftovers(hub) -> list[str]:
    return [path.name for path in hub.cache.rglob("*.incomplete")]


def offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_what_is_wanted_is_downloaded_and_only_once(hub, capsys) -> None:
    hosted = hub.add("someone/model", FILES)
    contents, folder = get()
    assert contents == {path: FILES[path] for path in WEIGHTS}
    assert hub.downloaded == WEIGHTS and not (folder / "notes.md").exists()
    told = capsys.readouterr().err
    assert f"Downloading 2 files (51.2 kB) of someone/model, commit {hosted.commit[:12]}, to {hub.cache}." in told
    hub.log.clear()
    get()
    assert not hub.downloaded and "Downloading" not in capsys.readouterr().err
    get(paths=[*WEIGHTS, "config.json"])
    assert hub.downloaded == ["config.json"]


def test_a_repository_is_pinned_to_its_commit(hub) -> None:
    hosted = hub.add("someone/model", FILES, branches=("main", "v1", "refs/pr/3"))
    for revision in (None, "v1", "refs/pr/3", hosted.commit):
        repository = open_repository(HubName("someone/model", revision, "weights"))
        assert repository.commit == hosted.commit
        assert repository.pinned == f"hf:someone/model@{hosted.commit}/weights"
        assert sorted(repository.files) == ["a.safetensors", "b.safetensors"]


def test_a_later_commit_needs_room_for_what_changed_alone(hub, monkeypatch, capsys) -> None:
    hub.add("someone/model", FILES)
    get()
    hosted = hub.add("someone/model", FILES | {"weights/b.safetensors": LARGE[:999]})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**6, 10**6 - 2000, 2000))
    hub.log.clear()
    capsys.readouterr()
    contents, folder = get()
    assert contents == {"weights/a.safetensors": LARGE, "weights/b.safetensors": LARGE[:999]}
    assert hub.downloaded == ["weights/b.safetensors"] and folder.name == hosted.commit
    assert "Downloading 1 file (999 bytes)" in capsys.readouterr().err


def test_a_folder_or_a_file_of_a_repository_stands_for_itself(hub) -> None:
    hub.add("someone/model", FILES)
    contents, folder = get(HubName("someone/model", None, "weights"), ["a.safetensors"])
    assert contents["a.safetensors"] == LARGE and folder.name == "weights"
    contents, _ = get(HubName("someone/model", None, "weights/b.safetensors"), ["b.safetensors"])
    assert contents["b.safetensors"] == LARGE[::-1]
    hub.add("someone/nested", {"a/a": b"inner"})
    assert get(HubName("someone/nested", None, "a"), ["a"])[0] == {"a": b"inner"}
    assert "has no folder or file nowhere at main; its folders are weights" in sentence(
        HubName("someone/model", None, "nowhere")
    )


def test_repositories_and_revisions_that_are_not_there_are_named(hub) -> None:
    hub.add("someone/model", FILES)
    assert "no model repository no/such" in (told := sentence(HubName("no/such"))) and "./no/such" in told
    told = sentence(HubName("someone/model", "v9"))
    assert "someone/model has no revision v9" in told and "https://huggingface.co/someone/model/tree/main" in told
    assert "not a possible name" in sentence(HubName("a--b/model"))


def test_a_file_that_is_listed_and_not_there_is_named(hub) -> None:
    hosted = hub.add("someone/model", FILES)
    hosted.lost = ("weights/b.safetensors",)
    assert "someone/model has no file weights/b.safetensors" in sentence()
    hosted = hub.add("other/model", FILES)
    repository = open_repository(HubName("other/model"))
    hosted.files = {path: content for path, content in FILES.items() if path != "weights/b.safetensors"}
    with pytest.raises(UserError, match="weights/b.safetensors of other/model did not arrive"):
        fetch(repository, WEIGHTS)


def test_a_gated_repository_is_explained_step_by_step(hub, monkeypatch) -> None:
    hub.add("someone/model", FILES, gated=True)
    told = sentence()
    steps = ["accept its licence at https://huggingface.co/someone/model", "`hf auth login`", "HF_TOKEN", "run this"]
    places = [told.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    assert "the token in use" in sentence()
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "does not accept the access token in use" in sentence()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get()[0]["weights/a.safetensors"] == LARGE


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(hub, monkeypatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hosted = hub.add("someone/model", FILES)
    hosted.cut = {"weights/a.safetensors": 2}
    assert get()[0]["weights/a.safetensors"] == LARGE
    ranges = [asked for method, path, asked in hub.log if method == "GET" and path.endswith("a.safetensors") and asked]
    assert ranges == ["bytes=12000-", "bytes=18000-"]


def test_a_download_that_fails_keeps_whole_files_and_goes_on(hub) -> None:
    hosted = hub.add("someone/model", FILES)
    hosted.cut = {"weights/b.safetensors": 10**6}
    assert "broke off" in (told := sentence()) and "run this again" in told
    assert not leftovers(hub)
    hosted.cut = {}
    hub.log.clear()
    assert get()[0] == {path: FILES[path] for path in WEIGHTS}
    assert hub.downloaded == ["weights/b.safetensors"]


@pytest.mark.parametrize("content", [LARGE[::-1], LARGE[:100], LARGE + b"more"], ids=("other", "less", "more"))
def test_what_arrives_with_another_hash_or_size_is_removed(hub, content) -> None:
    hosted = hub.add("someone/model", FILES)
    hosted.instead = {"weights/a.safetensors": content}
    told = sentence()
    assert "a.safetensors" in told or "broke off" in told  # the client itself refuses most wrong sizes
    assert "b.safetensors" not in told
    assert not leftovers(hub) and not [*hub.cache.rglob("a.safetensors")]
    hosted.instead = {}
    assert get()[0]["weights/a.safetensors"] == LARGE


def test_a_file_that_was_cut_in_the_cache_is_downloaded_again(hub) -> None:
    hub.add("someone/model", FILES)
    _, folder = get()
    (folder / WEIGHTS[0]).resolve().write_bytes(LARGE[:100])
    assert get()[0]["weights/a.safetensors"] == LARGE


def test_a_disk_without_room_is_told_before_anything_is_downloaded(hub, monkeypatch) -> None:
    hub.add("someone/model", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(10**6, 10**6 - 2000, 2000))
    assert "needs 51.2 kB more" in (told := sentence()) and "2.0 kB free" in told and "HF_HOME=" in told
    assert not hub.downloaded


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "HF_HOME=")]
)
def test_a_disk_that_refuses_is_told_in_one_sentence(hub, monkeypatch, number, words) -> None:
    hub.add("someone/model", FILES)

    def refuse(*_, **__):
        raise OSError(number, "No")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    assert words in sentence()
    assert not leftovers(hub)


def test_without_a_network_the_cache_serves(hub, monkeypatch, capsys) -> None:
    hosted = hub.add("someone/model", FILES)
    get()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    capsys.readouterr()
    assert get()[0]["weights/a.safetensors"] == LARGE
    assert f"using the cache's copy of someone/model, commit {hosted.commit[:12]}" in capsys.readouterr().err
    assert "cannot be reached" in (told := sentence(HubName("other/model"))) and "hf download other/model" in told
    assert "lacks config.json" in sentence(paths=["config.json"])


def test_offline_the_cache_serves_and_what_it_lacks_is_told(hub, monkeypatch) -> None:
    hosted = hub.add("someone/model", FILES)
    get()
    offline(monkeypatch)
    hub.log.clear()
    for revision in (None, "main", hosted.commit):
        assert get(HubName("someone/model", revision))[0]["weights/a.safetensors"] == LARGE
    assert "not in the cache" in (told := sentence(HubName("other/model"))) and "HF_HUB_OFFLINE" in told
    assert "not in the cache" in sentence(HubName("someone/model", "v2"))
    assert "not a possible name" in sentence(HubName("a--b/model"))
    assert "lacks config.json" in sentence(paths=[*WEIGHTS, "config.json"])
    shutil.rmtree(hub.cache / "models--someone--model" / "trees")  # as caches of older clients are
    assert get()[0]["weights/b.safetensors"] == LARGE[::-1]
    assert not hub.log


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down_is_told_or_stepped_over(hub, status) -> None:
    hub.add("someone/model", FILES)
    hub.fault = status
    assert f"answered {status}" in sentence()
    hub.fault = 0
    get()
    hub.fault = status
    assert get()[0]["weights/a.safetensors"] == LARGE


def test_an_answer_that_is_not_the_hubs_is_told(hub) -> None:
    hub.add("someone/model", FILES)
    hub.fault = 200  # with an empty page, as of a network that asks to sign in
    assert "is not the hub" in (told := sentence()) and "proxy" in told


def test_a_missing_client_is_told_with_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'difffract_jax\[hub\]'"):
        open_repository(NAME)
