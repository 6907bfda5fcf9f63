"""Features read and write alike, and what is not a feature is refused in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError

NUMBERS = st.none() | st.sets(st.integers(0, 60), min_size=1).map(lambda s: tuple(sorted(s)))


@st.composite
def parts(draw):
    stream, positions = draw(st.sampled_from(["img", "txt", "single"])), draw(NUMBERS)
    side = draw(st.sampled_from(["img", "txt"])) if stream == "single" and positions is not None else None
    return stream, draw(st.integers(0, 60)), draw(st.integers(0, 50_000)), positions, draw(NUMBERS), side


@given(parts())
def test_what_is_written_is_read(parts):
    feature = Feature(*parts)
    assert Feature.parse(str(feature)) == feature


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("img/3/f401", Feature("img", 3, 401)),
        ("txt/0/f7@2", Feature("txt", 0, 7, (2,))),
        ("single/5/f9@img12", Feature("single", 5, 9, (12,), None, "img")),
        ("img/2/f4@0-3,20#0,1", Feature("img", 2, 4, (0, 1, 2, 3, 20), (0, 1))),
    ],
)
def test_the_documented_forms_are_read(text, feature):
    assert Feature.parse(text) == feature


@pytest.mark.parametrize(
    "text", ["", "img", "img/3", "img/3/401", "image/3/f4", "img/-1/f4", "img/3/f4@", "img/3/f4@1-", "img/3/f4#a"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match=r"is not a feature; write STREAM/BLOCK/fN\[@POSITIONS\]\[#STEPS\]"):
        Feature.parse(text)


def test_ranges_count_upwards():
    with pytest.raises(UserError, match="counts from 5 down to 3; write 3-5"):
        Feature.parse("img/3/f4@5-3")


@pytest.mark.parametrize("text", ["single/5/f9@12", "img/5/f9@img12"])
def test_only_positions_of_single_stream_blocks_name_their_stream(text):
    with pytest.raises(UserError, match="as in single/5/f9@img12, and only there"):
        Feature.parse(text)
