"""Two evaluations side by side: the numbers are theirs, and sites that one lacks are told."""

import pytest

from difffract_jax.transcoders.comparison import comparison_table, side_by_side, unshared
from difffract_jax.transcoders.evaluation import Evaluation


def evaluation(alone=True, **fvu):
    """An evaluation of sites `img_0=FVU` and so on; L0 is ten times that, and what is recovered the rest to 1."""
    values = {name.replace("_", "/"): value for name, value in fvu.items()}
    sites = [{"site": site, "fvu": value, "l0": 10 * value, "dead": 0.0} for site, value in values.items()]
    recovered = [{"site": site, "recovered": 1 - value} for site, value in values.items()]
    return Evaluation("transcoder", [1.0], [], sites, [], recovered if alone else [], [], [], {})


def test_shared_sites_stand_in_a_row_each_with_both_numbers_and_their_difference():
    a, b = evaluation(img_0=0.5, img_1=0.25, txt_0=0.125), evaluation(single_0=1.0, img_1=0.5, img_0=0.25)
    rows = side_by_side(a, b)
    assert [row["site"] for row in rows] == ["img/0", "img/1", "mean"]
    assert rows[0]["fvu"] == {"a": 0.5, "b": 0.25, "difference": -0.25}
    assert rows[1]["recovered"] == {"a": 0.75, "b": 0.5, "difference": -0.25}
    assert rows[2]["l0"] == {"a": 3.75, "b": 3.75, "difference": 0.0}
    assert unshared(a, b) == (["txt/0"], ["single/0"])
    assert comparison_table(rows)[0]["FVU"] == "0.5, 0.25, -0.25"


def test_what_only_one_was_measured_for_is_left_out():
    rows = side_by_side(evaluation(img_0=0.5), evaluation(alone=False, img_0=0.5))
    assert len(rows) == 1 and rows[0].keys() == {"site", "fvu", "l0", "dead"}


@pytest.mark.parametrize("first", [True, False])
def test_sets_that_share_no_site_have_an_empty_table(first):
    pair = (evaluation(img_0=0.5), evaluation(txt_0=0.5))[:: 1 if first else -1]
    assert side_by_side(*pair) == [] and all(unshared(*pair))
