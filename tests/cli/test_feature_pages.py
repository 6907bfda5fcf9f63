"""Which feature pages commands print the addresses of, and how tables show them."""

from pathlib import Path

import pytest
from page_folders import make_folder

from difffract_jax.cli.feature_pages import AT_HAND, named_features, page_table, pages_at_hand, with_pages
from difffract_jax.config import UserError


@pytest.fixture
def pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return pages_at_hand(make_folder(Path("mine"), "t", {"img/1": range(30)}), "t")


def test_the_default_folder_is_taken_where_it_fits_and_nothing_said_where_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pages_at_hand(None, "t") is None
    make_folder(AT_HAND, "t", {"img/1": [3]})
    found = pages_at_hand(None, "t")
    assert found is not None and found.address("img/1/f3") == "dashboards/index.html#img/1/f3"
    assert pages_at_hand(None, "of others") is None
    with pytest.raises(UserError, match="pages of other transcoders"):
        pages_at_hand(AT_HAND, "of others")


def test_rows_get_a_page_where_one_of_them_has_one(pages):
    rows = [{"from": "img/1/f3@12", "attribution": 0.5}, {"from": "error img/0", "attribution": 0.1}]
    assert [row["page"] for row in with_pages(rows, pages, "from")] == ["mine/index.html#img/1/f3", None]
    assert with_pages(rows[1:], pages, "from") == rows[1:] and with_pages(rows, None, "from") == rows


def test_a_table_lists_every_page_once_and_no_more_than_fit(pages):
    names = ["img/1/f3@1", "img/1/f3", "img/1/f99", "pixels:color=red", "img/1/f4"]
    rows = [{"feature": f"img/1/f{n}", "page": f"mine/index.html#img/1/f{n}"} for n in (3, 4)]
    assert page_table(names, pages) == {"pages": rows}
    cut = page_table(names, pages, 1)
    assert cut["pages"] == rows[:1] and cut["more pages"].startswith("1;")
    assert page_table(names, None) == page_table([], pages) == {}


def test_features_are_found_wherever_a_result_names_them():
    result = {"verdict": "of img/1/f3, txt/0/f7@2 and img/1/f3", "tables": [{"n": 1, "edit": "single/0/f5=zero"}, None]}
    assert named_features(result) == ["img/1/f3", "txt/0/f7", "single/0/f5"]
