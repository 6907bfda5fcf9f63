"""Allow-lists: defaults, and one error for all that is wrong."""

import pytest

from converters.allow_list import REQUIRED, AllowList, read_attributes
from difffract_jax.config import UserError

ALLOW = AllowList("gadget", {"size": REQUIRED, "eps": 1e-6}, {"kind": ("round", "flat")}, frozenset({"version"}))


def test_read_attributes_come_back_with_their_defaults():
    assert read_attributes({"size": 3, "kind": "flat", "version": "9"}, ALLOW) == {"size": 3, "eps": 1e-6}


def test_all_problems_are_told_in_one_sentence():
    with pytest.raises(UserError) as error:
        read_attributes({"kind": "square", "colour": "red"}, ALLOW)
    expected = "missing: size; not understood: colour; unsupported: kind='square' (supported: 'round', 'flat')"
    assert expected in str(error.value)
