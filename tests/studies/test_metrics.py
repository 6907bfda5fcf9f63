"""Metrics see what changed and what did not, on images whose content is drawn, not generated."""

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.organism.world import from_caption
from difffract_jax.studies.metrics import MOST_PSNR, distances, intent, precision_recall, score_edits, sweep_table
from difffract_jax.studies.sheets import sheet

RED, GREEN = "a red circle left of a blue square", "a green circle left of a blue square"


def drawn(*captions, **changes):
    scenes = [from_caption(text)._replace(**changes) for text in captions]
    return np.stack([np.round(scene.images()[0] * 255).astype(np.uint8) for scene in scenes])


def judged(edited, prompt=RED, wanted=GREEN, original=None):
    before = drawn(prompt) if original is None else original
    found = score_edits([prompt], [intent(prompt, wanted)], before, drawn(edited))
    return bool(found.success[0]), bool(found.others[0]), float(found.flipped[0])


def test_intent_is_what_two_captions_differ_in():
    assert intent(RED, GREEN).attributes == (frozenset({"colour"}), frozenset())
    assert intent(RED).attributes == (frozenset(), frozenset())
    moved = intent(RED, "a red ring right of a blue square")
    assert moved.attributes == (frozenset({"kind", "place"}), frozenset({"place"}))
    assert intent(RED, "a red circle").attributes is None


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        (GREEN, (True, False, 0.0)),
        (RED, (False, False, 0.0)),
        ("a green circle left of a pink square", (False, True, 1.0)),
        ("a green ring left of a blue square", (False, False, 1.0)),
        ("a yellow circle left of a blue square", (False, False, 0.0)),
        ("a green circle on the left", (False, True, 4.0)),
    ],
)
def test_success_and_collateral_are_told_apart(edited, expected):
    assert judged(edited) == expected


MOVED = "a red circle right of a blue square"
BIG, SMALL, OPEN = (f"a {size}red circle left of a blue square" for size in ("big ", "small ", ""))


def counted(edited, prompt=RED, wanted=GREEN, original=None):
    before = drawn(prompt) if original is None else drawn(original)
    found = score_edits([prompt], [intent(prompt, wanted)], before, drawn(edited))
    return precision_recall(found.meant, found.reached, found.changed)


@pytest.mark.parametrize(
    ("edited", "precision", "recall"),
    [
        (GREEN, 1, 1),
        (RED, None, 0),
        ("a green circle left of a pink square", 1 / 2, 1),
        ("a green ring left of a pink square", 1 / 3, 1),
        ("a yellow circle left of a blue square", 0, 0),
        ("a green circle on the left", 1 / 5, 1),
        ("a blue square on the right", 0, 0),
    ],
)
def test_precision_and_recall_count_attributes(edited, precision, recall):
    assert counted(edited) == pytest.approx({"precision": precision, "recall": recall})


@pytest.mark.parametrize(
    ("edited", "precision", "recall"),
    [
        (MOVED, 1, 1),
        (RED, None, 0),
        ("a red circle above a blue square", 0, 0),
        ("a red circle right of a pink square", 1 / 2, 1),
    ],
)
def test_an_arrangement_is_one_attribute_and_counts_as_wanted_only(edited, precision, recall):
    assert counted(edited, wanted=MOVED) == pytest.approx({"precision": precision, "recall": recall})


def test_what_is_left_open_counts_for_nothing():
    for edited in (BIG, SMALL):
        assert counted(edited, prompt=BIG, wanted=OPEN) == {"precision": None, "recall": None}
    assert counted(BIG, prompt=SMALL, wanted=BIG) == {"precision": 1, "recall": 1}


def test_what_is_as_wanted_already_was_not_to_change():
    assert counted(BIG, prompt=OPEN, wanted=BIG, original=BIG) == {"precision": None, "recall": None}
    assert counted(BIG, prompt=OPEN, wanted=BIG, original=SMALL) == {"precision": 1, "recall": 1}


def test_a_concept_in_a_colour_not_its_own_is_compared():
    tomato = from_caption("a black tomato")
    image = np.round(tomato._replace(colour=tomato.named).images() * 255).astype(np.uint8)
    found = score_edits(["a black tomato"], [intent("a black tomato", "a black cross")], image, drawn("a black cross"))
    assert found.compared[0] and (found.meant[0], found.reached[0]) == (1, 1)


def test_precision_and_recall_pool_images_and_leave_out_what_cannot_be_compared():
    edited = ("a green circle left of a pink square", RED, "a lemon")
    found = score_edits([RED] * 3, [intent(RED, GREEN)] * 3, drawn(RED, RED, "a lemon"), drawn(*edited))
    told = precision_recall(found.meant, found.reached, found.changed)
    assert told == pytest.approx({"precision": 1 / 2, "recall": 1 / 2})
    moved = score_edits([RED], [intent(RED, "a red ring right of a blue square")], drawn(RED), drawn(RED))
    assert moved.meant[0] == 2 and not moved.reached.any()


def test_a_caption_is_taken_at_its_word():
    blue = from_caption("a blue lemon")
    image = np.round(blue._replace(colour=blue.named).images() * 255).astype(np.uint8)
    found = score_edits(["a lemon"], [intent("a lemon", "a blue lemon")], drawn("a lemon"), image)
    assert found.success[0] and not found.others[0] and found.read == ("blue lemon",)
    assert not judged("a blue lemon", "a lemon", "a blue lemon")[0]  # the world draws it yellow


def test_an_original_that_is_wrong_is_not_compared():
    found = score_edits([RED], [intent(RED)], drawn("a lemon"), drawn("a lemon"))
    assert not found.compared[0] and not found.success[0]


def test_distances_inside_and_outside_a_region():
    before = np.full((2, 8, 8, 3), 100, np.uint8)
    after, mask = before.copy(), np.zeros((8, 8), bool)
    mask[:, :4] = True
    after[0, :, :4] += 51
    after[1, :, 4:] += 51
    far = distances(before, after, mask)
    assert far.inside == pytest.approx([0.2, 0]) and far.outside == pytest.approx([0, 0.2])
    assert far.psnr == pytest.approx([MOST_PSNR, -20 * np.log10(0.2)])
    assert distances(before, after).inside == pytest.approx([0.2 / np.sqrt(2)] * 2)


def test_a_table_has_a_row_per_column_of_the_sweep():
    images = np.stack([drawn(RED, GREEN, "a green circle left of a pink square")] * 2)
    norms = np.array([[0.0, 1.0, 2.0]] * 2)
    mask = np.zeros((48, 48), bool)
    mask[:, :24] = True
    rows = sweep_table(("original", "x 1", "x 2"), images, norms, mask, RED, intent(RED, GREEN))
    assert [row["success"] for row in rows] == [0, 2, 0]
    assert [row["others changed"] for row in rows] == [0, 0, 2]
    assert [(row["precision"], row["recall"]) for row in rows] == [(None, 0), (1, 1), (0.5, 1)]
    assert rows[0]["psnr outside"] == rows[1]["psnr outside"] == MOST_PSNR > rows[2]["psnr outside"]
    assert (
        rows[1]["effect per norm"] == pytest.approx(rows[1]["inside"]) == pytest.approx(2 * rows[2]["effect per norm"])
    )
    plain = sweep_table(("original", "x 1", "x 2"), images, norms)
    assert "success" not in plain[0] and plain[1]["difference"] > 0


def test_a_prompt_outside_the_world_is_refused():
    with pytest.raises(UserError, match="knows no word `house`"):
        intent("a red house")


def test_a_sheet_has_room_for_all_images():
    images = drawn(RED, GREEN, RED, GREEN, RED, GREEN).reshape(2, 3, 48, 48, 3)
    page = sheet(images, ("seed 0", "seed 1"), ("a", "b", "c"))
    assert page.shape == (22 + 2 * (4 * 48 + 6), 64 + 3 * (4 * 48 + 6), 3)
    assert np.array_equal(page[22:214:4, 64:256:4], images[0, 0])
