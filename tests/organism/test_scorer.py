"""The scorer reads what was drawn, and calls unreadable what is neither one thing nor another."""

import numpy as np
import pytest

from difffract_jax.organism.captions import COLOUR_NAMES, CONCEPTS, PLACES, RELATIONS
from difffract_jax.organism.render import COLOURS, NOUNS, SIDE, background, draw_scenes
from difffract_jax.organism.scorer import UNREADABLE, describe, interval, judge, read_scenes
from difffract_jax.organism.world import IS_CONCEPT, concatenate, from_caption, scenes

SHAPES = [noun for kind, noun in enumerate(NOUNS) if not IS_CONCEPT[kind]]


def one(noun, colour, centre=24.0, radius=8.5):
    """The picture of one object."""
    return draw_scenes(
        np.ones(1, int),
        np.full((1, 1), NOUNS.index(noun)),
        np.full((1, 1), tuple(COLOURS).index(colour)),
        np.full((1, 1, 2), centre, np.float32),
        np.full((1, 1), radius, np.float32),
    )


def readable(reading):
    """Objects that have both a kind and a colour."""
    return int(((reading.kind != UNREADABLE) & (reading.colour != UNREADABLE)).sum())


def pairs_of_shapes(size, arrangements):
    """Pairs of different shapes in different colours, in given arrangements."""
    drawn = scenes(9, 0, 60 * size, "train", (2,))
    plain = ~IS_CONCEPT[drawn.kind[:, :2]].any(axis=1)
    differ = (drawn.kind[:, 0] != drawn.kind[:, 1]) & (drawn.colour[:, 0] != drawn.colour[:, 1])
    lies = np.isin(drawn.arrangement, [RELATIONS.index(name) for name in arrangements])
    return drawn.take(plain & differ & lies).take(np.arange(size))


def swapped(drawn, name):
    """The same scenes with one property of the two objects exchanged."""
    values = getattr(drawn, name).copy()
    values[:, :2] = values[:, 1::-1]
    return drawn._replace(**{name: values})


@pytest.mark.parametrize(("split", "counts"), [("train", (1, 2)), ("held out", (1, 2)), ("held out", (3,))])
def test_true_renderings_are_all_right(split, counts):
    drawn = scenes(11, 0, 300, split, counts)
    seen = read_scenes(drawn.images())
    verdict = judge(drawn, seen)
    for name, holds in verdict._asdict().items():
        assert holds.all(), (name, [drawn.captions[row] for row in np.flatnonzero(~holds)])


def test_sizes_and_centres_are_read():
    drawn = scenes(12, 0, 200, "train", (1,))
    seen = read_scenes(drawn.images())
    np.testing.assert_array_equal(seen.size[:, 0], drawn.size[:, 0])
    assert np.abs(seen.centre[:, 0] - drawn.centre[:, 0]).max() < 1  # pixel


def test_swapped_colours_are_seen_but_not_bound():
    asked = pairs_of_shapes(60, ("left", "right", "above", "below", "and"))
    verdict = judge(asked, read_scenes(swapped(asked, "colour").images()))
    assert verdict.kinds.all() and verdict.colours.all()
    assert not (verdict.bound | verdict.placed | verdict.right).any()


def test_swapped_positions_are_bound_but_not_placed():
    asked = pairs_of_shapes(60, ("left", "right", "above", "below"))
    verdict = judge(asked, read_scenes(swapped(asked, "centre").images()))
    assert verdict.bound.all()
    assert not (verdict.placed | verdict.right).any()


def test_positions_do_not_matter_where_the_caption_leaves_them_open():
    asked = pairs_of_shapes(30, ("and",))
    assert judge(asked, read_scenes(swapped(asked, "centre").images())).right.all()


def test_an_object_too_few_or_too_many_is_wrong():
    asked = pairs_of_shapes(30, ("left",))
    fewer, triple = asked._replace(count=np.ones(30, int)), scenes(0, 0, 30, "held out", (3,))
    for shown in (fewer, triple):
        verdict = judge(asked, read_scenes(shown.images()))
        assert not (verdict.kinds | verdict.colours | verdict.bound | verdict.right).any()
    assert not judge(triple, read_scenes(asked.images())).kinds.any()


@pytest.mark.parametrize("place", [place for place in PLACES if place != "middle"])
def test_a_single_object_must_lie_where_it_is_asked_for(place):
    where = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
    asked = concatenate([from_caption(f"a red circle {where[place]}")] * 5)
    shown = concatenate([from_caption(f"a red circle {words}") for words in (*where.values(), "")])
    verdict = judge(asked, read_scenes(shown.images()))
    assert verdict.bound.all()
    assert verdict.placed.tolist() == [name == place for name in (*where, "middle")]


def test_the_empty_image_reads_as_nothing():
    seen = read_scenes(background()[None])
    assert seen.count.tolist() == [0]
    assert describe(seen, 0) == "nothing"
    assert not judge(from_caption("a red circle"), seen).right.any()


def test_noise_is_unreadable():
    seen = read_scenes(np.random.default_rng(0).random((20, SIDE, SIDE, 3), np.float32))
    assert np.all(seen.count >= 1)
    assert readable(seen) == 0


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), COLOURS["red"]])
def test_an_image_without_background_holds_something_unreadable(colour):
    image = np.broadcast_to(np.array(colour, np.float32), (1, SIDE, SIDE, 3)).copy()
    alone = read_scenes(image)
    assert alone.count.tolist() == [1]
    assert readable(alone) == 0


def test_an_image_is_read_alike_alone_and_among_others():
    images = np.concatenate([scenes(13, 0, 6).images(), np.zeros((1, SIDE, SIDE, 3), np.float32), background()[None]])
    together = read_scenes(images)
    for row in range(len(images)):
        alone, number = read_scenes(images[row : row + 1]), together.count[row]
        assert alone.count[0] == number
        for column in ("kind", "colour", "size", "centre"):
            np.testing.assert_array_equal(getattr(alone, column)[0, :number], getattr(together, column)[row, :number])


@pytest.mark.parametrize("noun", SHAPES)
@pytest.mark.parametrize("colours", [("red", "blue"), ("orange", "blue"), ("yellow", "blue"), ("red", "purple")])
def test_figures_of_two_halves_are_unreadable(noun, colours):
    left, right = (one(noun, colour) for colour in colours)
    halves = np.concatenate([left[:, :, : SIDE // 2], right[:, :, SIDE // 2 :]], axis=2)
    assert readable(read_scenes(halves)) == 0


@pytest.mark.parametrize("colours", [("red", "green"), ("yellow", "blue"), ("orange", "blue"), ("yellow", "purple")])
def test_blends_of_two_colours_are_unreadable(colours):
    one_of_them, other = (one("square", colour) for colour in colours)
    assert readable(read_scenes((one_of_them + other) / 2)) == 0


def test_figures_that_run_into_one_another_are_no_two_objects():
    touching = draw_scenes(
        np.full(1, 2),
        np.array([[NOUNS.index("circle"), NOUNS.index("square")]]),
        np.array([[0, 4]]),
        np.array([[[18.0, 24.0], [30.0, 24.0]]], np.float32),
        np.full((1, 2), 8.5, np.float32),
    )
    seen = read_scenes(touching)
    assert seen.count.tolist() == [1]
    assert readable(seen) == 0


def test_specks_are_overlooked_and_crumbs_are_unreadable_objects():
    image = one("ring", "black", 32.0)[0]
    speck, crumb = image.copy(), image.copy()
    speck[3:5, 3:5] = crumb[3:6, 3:6] = COLOURS["red"]
    seen = read_scenes(np.stack([speck, crumb]))
    assert seen.count.tolist() == [1, 2]
    assert sorted(seen.kind[1, :2]) == [UNREADABLE, NOUNS.index("ring")]


def test_readings_are_told_in_words():
    seen = read_scenes(np.concatenate([from_caption("a pink ring left of a lemon").images(), one("square", "blue")]))
    assert sorted(describe(seen, 0).split(", ")) == ["pink ring", "yellow lemon"]
    assert describe(seen, 1) == "blue square"
    mixed = seen._replace(colour=np.full_like(seen.colour, UNREADABLE), kind=np.full_like(seen.kind, UNREADABLE))
    assert describe(mixed, 1) == "mixed unreadable"


@pytest.mark.parametrize("noun", NOUNS)
def test_figures_are_read_in_every_colour_that_the_world_gives_them(noun):
    for colour in (CONCEPTS[noun],) if noun in CONCEPTS else COLOUR_NAMES:
        seen = read_scenes(np.concatenate([one(noun, colour, 22.3, radius) for radius in (6.2, 8.6)]))
        assert seen.kind[:, 0].tolist() == [NOUNS.index(noun)] * 2, colour
        assert seen.colour[:, 0].tolist() == [COLOUR_NAMES.index(colour)] * 2, colour
        assert seen.size[:, 0].tolist() == [0, 1], colour


@pytest.mark.parametrize("noun", CONCEPTS)
def test_concepts_in_foreign_colours_are_never_taken_for_something_else(noun):
    """A model may draw them; a pale body below a dark tuft may be unreadable."""
    drawn = [(one(noun, colour, 22.3, radius), colour) for colour in COLOUR_NAMES for radius in (6.2, 8.6)]
    seen = read_scenes(np.concatenate([image for image, _ in drawn]))
    assert np.all(seen.count == 1)
    wanted = np.array([COLOUR_NAMES.index(colour) for _, colour in drawn])
    right = (seen.kind[:, 0] == NOUNS.index(noun)) & (seen.colour[:, 0] == wanted)
    assert np.all(right | (seen.kind[:, 0] == UNREADABLE) | (seen.colour[:, 0] == UNREADABLE))
    assert np.mean(right) > 0.8


# Wilson's 95% intervals: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96.
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (50, 100, 0.4038, 0.5962)],
)
def test_intervals_are_wilsons(right, total, low, high):
    assert interval(right, total) == pytest.approx((low, high), abs=5e-5)


def test_a_surer_interval_is_wider():
    narrow, wide = interval(40, 50), interval(40, 50, 0.99)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]
