"""Addresses of feature pages: of features that have one, in a folder of the transcoders in use."""

from pathlib import Path

import pytest
from page_folders import make_folder

from difffract_jax.config import UserError
from difffract_jax.dashboards.features.addresses import open_pages


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "a folder", "t" * 64, {"img/1": [3, 159], "single/0": [7]})


def test_an_address_names_the_folder_s_page_and_the_feature(folder):
    pages = open_pages(folder, "t" * 64)
    assert pages.address("img/1/f159@13#1") == f"{folder / 'index.html'}#img/1/f159"
    assert pages.address("single/0/f7@txt") == f"{folder / 'index.html'}#single/0/f7"
    without = ["img/1/f15", "img/1/f1590", "txt/0/f3", "error img/1", "input txt", "pixels:color=red", ""]
    assert [pages.address(name) for name in without] == [""] * len(without)
    assert pages.missing(["img/1/f3", "img/1/f4", "txt/0/f3"]) == ["img/1/f4", "txt/0/f3"]


def test_a_folder_named_from_here_gives_addresses_from_here(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert open_pages(Path("a folder")).address("img/1/f3") == "a folder/index.html#img/1/f3"


def test_what_is_no_folder_of_these_pages_is_one_sentence(folder):
    with pytest.raises(UserError, match=r"has no index\.html; give the folder that `difffract dashboards` wrote"):
        open_pages(folder.parent)
    with pytest.raises(UserError, match="pages of other transcoders .tttttttttttt.... than those in use .u.; make"):
        open_pages(folder, "u")
    (folder / "scan" / "config.json").unlink()
    with pytest.raises(UserError, match="holds no scan of features"):
        open_pages(folder)


@pytest.mark.parametrize("text", ["", "difffract.list(", 'difffract.list("img/1",{});', "difffract.list(1);"])
def test_a_damaged_list_is_one_sentence(folder, text):
    (folder / "data" / "img-1" / "list.js").write_text(text, encoding="ascii")
    with pytest.raises(UserError, match=r"list\.js cannot be read; make the pages again"):
        open_pages(folder).address("img/1/f3")
