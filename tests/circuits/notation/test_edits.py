"""Edits say what they mean, act where they say, and are refused in one sentence where they cannot."""

import numpy as np
import pytest

from difffract_jax.address import IMAGE, JOINT, TEXT, Layout, Stack, flux_layout
from difffract_jax.circuits.editing.edit_tables import lay_out
from difffract_jax.circuits.notation.edits import Edit, Supernode, WholeSite
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.circuits.notation.region import box_mask, read_mask, tokens_in
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import Run
from difffract_jax.storage.images import save_image
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.transcoder import TranscoderConfig, TranscoderSet

SHAPE = TranscoderConfig(d_model=8, features=40, time_embed=0, conditioning="none")
TCS = TranscoderSet({}, sites_of({"img": (0, 1), "txt": (1,), "joint": (0, 1)}), SHAPE, "")
PLACES = flux_layout(2, 2), TCS, Run((3, 3), 5, np.zeros(5, np.float32), None)
"""Layout, transcoders without weights, and a run of 9 image tokens, 5 text tokens and 4 steps."""
MASK = np.array([True, True, True, False, False])


def table(stream, *edits, mask=MASK, block=1):
    """Returns one block's edits; the groups are img, txt, joint."""
    place = ("img", "txt", "joint").index(stream)
    group = lay_out([Edit.parse(e) if isinstance(e, str) else e for e in edits], *PLACES, mask)[place]
    return type(group.edits)(*(column[block] for column in group.edits))


@pytest.mark.parametrize(
    "text",
    ["img/2/f401=zero", "img/2/f4@0-2,9#0,2=scale:-2", "single/5/f9@img12=set:1.5", "txt/0/f7@2=add:0.5"]
    + [
        "red:img/1/f3@4+single/0/f9=invert",
        "img/0/f1+txt/0/f2=zero",
        "img/2=zero",
        "single/1@txt0-3#2=zero",
        "txt=zero",
    ],
)
def test_an_edit_reads_back_as_it_was_written(text):
    assert str(Edit.parse(text)) == text


def test_an_edit_is_of_a_feature_a_supernode_a_site_or_a_stream():
    assert Edit.parse("img/2/f4@1=zero").feature == Feature("img", 2, 4, (1,))
    features = Feature("img", 1, 3), Feature("txt", 0, 9)
    assert Edit.parse("red circle:img/1/f3+txt/0/f9=zero").feature == Supernode("red circle", features)
    assert Edit.parse("single/1@img2=zero").feature == WholeSite("single", 1, (2,), side="img")
    assert Edit.parse("txt#1=zero").feature == WholeSite("txt", None, steps=(1,))
    assert (Edit.parse("img/2/f4=add:.5").mode, Edit.parse("img/2/f4=add:.5").amount) == ("add", 0.5)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("img/2/f4", "'img/2/f4' is not an edit; write FEATURE=zero|invert|scale:2|set:1.5|add:.5."),
        ("img/2/f4=double", "does 'double' to a feature, but edits are zero|invert|scale:2"),
        ("img/2/f4=scale", "does 'scale' to a feature, but edits are"),
        ("img/2/f4=zero:1", "does 'zero:1' to a feature, but edits are"),
        ("img/2/f4=set:much", "The amount in 'img/2/f4=set:much' must be a number, but is 'much'"),
        ("img/2/f4=set:inf", "amount must be a finite number, but got inf"),
        ("image/2/f4=zero", "'image/2/f4' is not a feature; write STREAM/BLOCK/fN"),
        ("single/1@3=zero", "Positions in single-stream blocks need their stream"),
        ("red:=zero", "'red:' is not a feature"),
    ],
)
def test_a_text_that_is_no_edit_is_refused(text, told):
    with pytest.raises(UserError) as caught:
        Edit.parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("stream", "edit", "expected"),
    [
        ("img", "img/1/f5=zero", range(9)),
        ("img", "img/1/f5@3,7=zero", [3, 7]),
        ("img", Edit("img/1/f5@3,7", "zero", region=(7, 8)), [7]),
        ("txt", "txt/1/f5=zero", [0, 1, 2]),
        ("txt", "txt/1/f5@4=zero", [4]),
        ("txt", Edit("txt/1/f5", "zero", region=(7,)), [0, 1, 2]),
        ("joint", "single/1/f5=zero", [0, 1, 2, *range(5, 14)]),
        ("joint", "single/1/f5@img0,8=zero", [5, 13]),
        ("joint", "single/1/f5@txt1=zero", [1]),
        ("joint", "single/1@txt1,4=zero", [1, 4]),
        ("joint", Edit("single/1/f5", "zero", region=(2,)), [7]),
    ],
)
def test_an_edit_acts_where_it_says_and_leaves_padding_alone(stream, edit, expected):
    assert np.flatnonzero(table(stream, edit).positions[0]).tolist() == list(expected)


def test_padding_is_edited_where_it_counts():
    assert table("txt", "txt/1/f5=zero", mask=np.ones(5, bool)).positions.all()


def test_a_supernode_edits_each_of_its_features_at_its_own_places():
    edit = "img/1/f3@4+img/1/f9#2=set:2"
    found = table("img", edit)
    assert found.feature.tolist() == [3, 9]
    assert (found.positions.sum(axis=1).tolist(), found.steps.sum(axis=1).tolist()) == ([1, 9], [4, 1])
    assert found.offset.tolist() == [2, 2]


def test_a_stream_is_every_block_with_a_transcoder():
    layers = lay_out([Edit.parse("img=zero"), Edit.parse("txt=zero")], *PLACES, MASK)
    assert [group.touched.tolist() for group in layers] == [[True, True], [False, True], [False, False]]


def test_sites_of_a_model_of_other_stacks_lie_where_their_names_count_on():
    """Image sites of two stacks are numbered through; each group's table has its own."""
    layout = Layout((Stack("pairs", 2, (IMAGE, TEXT)), Stack("alone", 3, (IMAGE,)), Stack("single", 1, (JOINT,))))
    tcs = TCS._replace(sites=sites_of({"img": (1, 3, 4), "joint": (0,)}, layout.groups))
    edits = [Edit.parse("img/3/f7@2=set:5"), Edit.parse("single/0/f1@txt1=zero")]
    pairs, text, alone, single = lay_out(edits, layout, tcs, PLACES[2], MASK, replaced=[WholeSite("img", 1)])
    assert [group.touched.tolist() for group in (pairs, text)] == [[False, True], [False, False]]
    assert alone.touched.tolist() == [False, True, False] and alone.edits.feature[1].tolist() == [7]
    assert (pairs.slot.tolist(), alone.slot.tolist(), single.touched.tolist()) == ([0, 0], [0, 1, 2], [True])
    assert np.flatnonzero(alone.edits.positions[1, 0]).tolist() == [2]
    assert np.flatnonzero(single.edits.positions[0, 0]).tolist() == [1]


def test_a_sweep_scales_what_multiplies_and_multiplies_what_is_added():
    swept = [Edit.parse(f"img/0/f1={how}").swept(-2.0) for how in ("zero", "scale:3", "invert", "set:1.5", "add:.5")]
    assert [(edit.mode, edit.amount) for edit in swept] == [("scale", -2)] * 3 + [("set", -3), ("add", -1)]


@pytest.mark.parametrize(
    "pair",
    [
        ("img/1/f3=zero", "img/1/f3=set:1"),
        ("img/1/f3@0-4=set:2", "img/1/f3@4#1=set:1"),
        ("single/1/f3=zero", "single/1/f3@img2=set:1"),
        ("a:img/0/f1+img/1/f3=zero", "img/1/f3=set:1"),
        ("img/1=zero", "img/1=set:1"),
    ],
)
def test_edits_that_contradict_each_other_are_refused(pair):
    with pytest.raises(UserError, match="Edits contradict each other: .* set the same feature to different values"):
        lay_out([Edit.parse(text) for text in pair], *PLACES, MASK)


@pytest.mark.parametrize(
    "pair",
    [
        ("img/1/f3@0-4=zero", "img/1/f3@5=set:1"),
        ("img/1/f3#0=zero", "img/1/f3#1=set:1"),
        ("single/1/f3@txt2=zero", "single/1/f3@img2=set:1"),
        ("img/1/f3=zero", "img/1/f3=zero"),
        ("img/1=zero", "img/1/f3=set:1"),
        ("img/1/f3=scale:2", "img/1/f3=add:1"),
    ],
)
def test_edits_that_follow_one_another_are_not(pair):
    lay_out([Edit.parse(text) for text in pair], *PLACES, MASK)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (Edit("img/2/f0", "zero"), "There is no transcoder at img/2; blocks with one: 0, 1."),
        (Edit(WholeSite("image", 0), "zero"), "A site's stream must be one of img, txt, single, but got 'image'."),
        (Edit("single/0/f40", "zero"), "names feature 40, but there are 0 to 39."),
        (Edit("single/0/f4@txt5", "zero"), "names position 5, but there are 0 to 4."),
        (Edit("img/0/f4@9", "zero"), "names position 9, but there are 0 to 8."),
        (Edit("img/0/f4", "zero", steps={1, 4}), "names step 4, but there are 0 to 3."),
        (Edit("img/0/f4", "zero", steps=()), "names an empty set of steps"),
        (Edit("img/0/f4", "zero", region=()), "acts on no token"),
        (Edit("img/0/f4@1", "zero", region=(2,)), "acts on no token"),
        (Edit("img/0/f4", "zero", region=(9,)), "names image token 9, but there are 0 to 8."),
    ],
)
def test_an_edit_of_what_is_not_there_is_refused(edit, told):
    with pytest.raises(UserError) as caught:
        lay_out([edit], *PLACES, MASK)
    assert told in str(caught.value)


def test_a_region_holds_the_tokens_whose_pixels_it_covers(tmp_path):
    mask = box_mask("0,8,20,24", (24, 24))
    assert tokens_in(mask, (3, 3)) == (3, 4, 5, 6, 7, 8)
    assert tokens_in(box_mask("0,8,17,16", (24, 24)), (3, 3)) == (3, 4)
    save_image(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255, tmp_path / "mask.png", {})
    assert np.array_equal(read_mask(tmp_path / "mask.png", (24, 24)), mask)


def test_a_region_that_is_none_is_refused(tmp_path):
    save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / "dark.png", {})
    (tmp_path / "text.png").write_text("no picture")
    for make, told in (
        (lambda: box_mask("0,0,24", (24, 24)), "A box is X0,Y0,X1,Y1 in whole pixels"),
        (lambda: box_mask("0,0,25,24", (24, 24)), "is empty or leaves the image, which is 24 x 24 pixels"),
        (lambda: box_mask("4,0,4,24", (24, 24)), "is empty or leaves the image"),
        (lambda: tokens_in(box_mask("0,0,1,1", (24, 24)), (3, 3)), "The region holds no image token"),
        (lambda: read_mask(tmp_path / "dark.png", (8, 8)), "is dark everywhere"),
        (lambda: read_mask(tmp_path / "dark.png", (9, 8)), "is 8 x 8 pixels, but the image is 8 x 9"),
        (lambda: read_mask(tmp_path / "text.png", (8, 8)), "is not a picture that can be read"),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert told in str(caught.value)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 5.0, float("nan")])
def test_a_threshold_is_a_share_below_one(threshold):
    with pytest.raises(UserError, match=r"share of a feature's maximum, at least 0 and below 1, but got"):
        Edit("img/2/f401", "zero", threshold=threshold)
