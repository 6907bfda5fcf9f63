"""Links join the nodes that their names can mean; what a name does not tell is counted."""

import numpy as np
from viewer_documents import link

from difffract_jax.graphs.files.viewer_links import resolve_links

IDS = ["0_3_1", "t", "0_3_1", "u"]
ERRORS = np.array([True, False, False, False])
BLOCK = np.array([3, 5, 0, 2])


def resolved(*links):
    return resolve_links([link(*ends, 1.0) for ends in links], IDS, ERRORS, BLOCK)


def test_a_link_to_a_shared_name_leads_to_the_feature():
    found = resolved(("u", "0_3_1"))
    assert (found.source.tolist(), found.target.tolist(), found.unclear) == ([3], [2], None)


def test_a_target_below_the_error_can_only_be_the_feature_s():
    found = resolved(("0_3_1", "u"))
    assert found.source.tolist() == [2] and found.unclear is None


def test_a_link_for_each_node_goes_by_the_order_of_the_nodes():
    found = resolved(("0_3_1", "t"), ("u", "t"), ("0_3_1", "t"))
    assert found.source.tolist() == [0, 3, 2] and found.target.tolist() == [1, 1, 1]
    assert found.unclear.in_doubt == 2 and found.unclear.shared == ("0_3_1",)


def test_a_single_link_in_doubt_is_the_feature_s():
    found = resolved(("0_3_1", "t"))
    assert found.source.tolist() == [2] and found.unclear.in_doubt == 1
    (told,) = found.unclear.sentences()
    assert told.startswith("1 link from 0_3_1 was given to an error or to a feature, which share that name: ")


def test_links_to_absent_nodes_are_left_out_and_the_first_names_told():
    found = resolved(*((name, "t") for name in "abcde"), ("u", "t"))
    assert found.source.tolist() == [3] and len(found.kept) == 1
    assert found.unclear.left_out == 5
    assert found.unclear.sentences() == ["5 links were left out, as the document has no node a, b or c."]


def test_links_that_repeat_others_are_kept_and_counted():
    found = resolved(("u", "t"), ("0_3_1", "u"), ("u", "t"), ("u", "t"))
    assert found.source.tolist() == [3, 2, 3, 3] and len(found.kept) == 4
    assert (found.unclear.repeated, found.unclear.pairs, found.unclear.left_out) == (2, ("u -> t",), 0)
    (told,) = found.unclear.sentences()
    assert told == (
        "2 links between nodes that another link joins already (u -> t) are kept beside it, so that their weights add "
        "up."
    )
    (told,) = resolved(("u", "t"), ("u", "t")).unclear.sentences()
    assert told.startswith("1 link between nodes that another link joins already (u -> t) is kept beside it")


def test_links_of_two_nodes_of_one_name_repeat_nothing():
    assert resolved(("0_3_1", "t"), ("0_3_1", "t")).unclear.repeated == 0
