"""Figures, and how scenes are laid over the background."""

import numpy as np
import pytest

from difffract_jax.organism.render import COLOURS, FIGURES, NOUNS, SIDE, background, coverage, draw_scenes

CENTRE, RADIUS = np.full((1, 2), SIDE / 2, np.float32), np.full(1, 8.0, np.float32)
WITH_ACCENT = ("tomato", "carrot")


def random_scenes(size, seed=0):
    """Arguments of `draw_scenes`: any objects anywhere, so that they overlap and leave the canvas."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 4, size),
        rng.integers(0, len(NOUNS), (size, 3)),
        rng.integers(0, len(COLOURS), (size, 3)),
        rng.uniform(0, SIDE, (size, 3, 2)).astype(np.float32),
        rng.uniform(5, 9, (size, 3)).astype(np.float32),
    )


def one(kind=0, colour=0, centre=(24.0, 24.0), radius=8.0):
    """Arguments of `draw_scenes` for one scene of one object."""
    return (
        np.ones(1, int),
        np.full((1, 1), kind),
        np.full((1, 1), colour),
        np.array([[centre]], np.float32),
        np.full((1, 1), radius, np.float32),
    )


@pytest.mark.parametrize("noun", NOUNS)
def test_a_figure_lies_within_its_radius(noun):
    covered = coverage(NOUNS.index(noun), CENTRE, RADIUS)[0][0]
    away = np.abs(np.arange(SIDE) + 0.5 - SIDE / 2)
    beyond = np.maximum(away[:, None], away[None, :]) > RADIUS[0] + 0.5  # edges are one pixel wide
    assert not covered[beyond].any()
    assert covered.max() == 1


@pytest.mark.parametrize("noun", NOUNS)
def test_accent_and_rim_lie_within_the_figure(noun):
    covered, accent, rim = coverage(NOUNS.index(noun), CENTRE, RADIUS)
    assert np.all(accent <= covered) and np.all(rim <= covered)
    assert accent.any() == (noun in WITH_ACCENT)
    assert rim.any()


def test_no_two_figures_are_alike():
    shapes = {coverage(kind, CENTRE, RADIUS)[0].tobytes() for kind in range(len(NOUNS))}
    assert len(shapes) == len(FIGURES)


def test_an_empty_scene_is_the_background():
    image = draw_scenes(np.zeros(1, int), *random_scenes(1)[1:])
    np.testing.assert_array_equal(image[0], background())


def test_slots_beyond_the_count_leave_no_trace():
    count, *objects = random_scenes(20)
    others = [column.copy() for column in objects]
    empty = np.arange(3) >= count[:, None]
    for column, replacement in zip(others, random_scenes(20, seed=1)[1:], strict=True):
        column[empty] = replacement[empty]
    np.testing.assert_array_equal(draw_scenes(count, *objects), draw_scenes(count, *others))


def test_a_batch_is_drawn_as_its_scenes_one_by_one():
    scenes = random_scenes(30)
    together = draw_scenes(*scenes)
    for row in range(30):
        np.testing.assert_array_equal(together[row], draw_scenes(*(column[row : row + 1] for column in scenes))[0])


def test_pixels_are_colours():
    image = draw_scenes(*random_scenes(30))
    assert image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1


def test_a_canvas_is_drawn_on_and_kept():
    canvas = np.random.default_rng(0).random((1, SIDE, SIDE, 3), np.float32)
    before = canvas.copy()
    image = draw_scenes(*one(), canvas)
    np.testing.assert_array_equal(canvas, before)
    assert not np.array_equal(image[0, 24, 24], canvas[0, 24, 24])
    # Above and to the left of the figure, where no shadow falls, the canvas is what it was.
    np.testing.assert_array_equal(image[0, :15, :15], canvas[0, :15, :15])


def test_the_empty_scene_is_the_canvas_where_none_is_given():
    np.testing.assert_array_equal(draw_scenes(*one()), draw_scenes(*one(), background()[None]))


def test_later_objects_lie_over_earlier_ones():
    kind, colour = np.array([[0, 1]]), np.array([[0, 4]])
    centre, radius = np.full((1, 2, 2), 24.0, np.float32), np.full((1, 2), 8.0, np.float32)
    alone = draw_scenes(np.ones(1, int), kind[:, 1:], colour[:, 1:], centre[:, 1:], radius[:, 1:])
    both = draw_scenes(np.full(1, 2), kind, colour, centre, radius)
    np.testing.assert_array_equal(both[0, 24, 24], alone[0, 24, 24])


@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_of_an_object_has_its_colour(colour):
    number = tuple(COLOURS).index(colour)
    np.testing.assert_allclose(
        draw_scenes(*one(colour=number))[0, 24, 24], COLOURS[colour], atol=0.02
    )  # light from above


def test_every_object_drops_a_shadow_to_the_right_and_below():
    image = draw_scenes(*one(NOUNS.index("square"), radius=8.0))[0]
    bottom = SIDE // 2 + 8
    assert np.all(image[bottom, 24] < background()[bottom, 24])
