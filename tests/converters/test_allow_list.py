"""Allow-lists: defaults, and one error for all that is wrong."""

import re

import pytest

from converters.allow_list import REQUIRED, AllowList, read_attributes
from difffract_jax.config import UserError

ALLOW = AllowList("gadget", {"size": REQUIRED, "eps": 1e-6}, {"kind": ("round", "flat")}, frozenset({"version"}))


def test_read_attributes_come_back_with_their_defaults():
    assert read_attributes({"size": 3, "kind": "flat", "version": "9"}, ALLOW) == {"size": 3, "eps": 1e-6}


@pytest.mark.parametrize("size", ["3", None, -1, 1.5, True, [3]])
def test_a_size_is_a_whole_number(size):
    with pytest.raises(UserError, match=rf"unsupported: size={re.escape(repr(size))} \(a whole number is needed\)"):
        read_attributes({"size": size}, ALLOW)


def test_a_list_of_sizes_is_a_list():
    allow = ALLOW._replace(read={"axes": (1, 2)})
    assert read_attributes({"axes": [3, 4]}, allow) == {"axes": [3, 4]}
    with pytest.raises(UserError, match="unsupported: axes=None"):
        read_attributes({"axes": None}, allow)
    with pytest.raises(UserError, match=r"axes=\[3, 'a'\] \(a list of whole numbers is needed\)"):
        read_attributes({"axes": [3, "a"]}, allow)


@pytest.mark.parametrize("eps", ["x", None, [1.0], True])
def test_a_number_is_a_number(eps):
    assert read_attributes({"size": 3, "eps": 1}, ALLOW)["eps"] == 1
    with pytest.raises(UserError, match=r"eps=.* \(a number is needed\)"):
        read_attributes({"size": 3, "eps": eps}, ALLOW)


def test_all_problems_are_told_in_one_sentence():
    with pytest.raises(UserError) as error:
        read_attributes({"kind": "square", "colour": "red"}, ALLOW)
    expected = "missing: size; not understood: colour; unsupported: kind='square' (supported: 'round', 'flat')"
    assert expected in str(error.value)
