"""Captions are understood as they were meant, and what is not a caption is refused in one sentence."""

import itertools

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.organism.captions import (
    COLOUR_NAMES,
    CONCEPTS,
    PLACE_WORDS,
    PLACES,
    PREFIXES,
    RELATION_WORDS,
    RELATIONS,
    SIZE_NAMES,
    Parsed,
    Phrase,
    caption,
    object_phrase,
    parse,
)
from difffract_jax.organism.render import NOUNS


def random_objects(rng, count):
    """Objects that differ pairwise, also as they would be drawn; colour and size are left unsaid where they may be."""
    while True:
        nouns = rng.choice(NOUNS, count)
        colours = [str(rng.choice((*COLOUR_NAMES, "") if noun in CONCEPTS else COLOUR_NAMES)) for noun in nouns]
        drawn = {(noun, CONCEPTS.get(noun, colour)) for noun, colour in zip(nouns, colours, strict=True)}
        if len(drawn) == count:
            sizes = rng.choice((*SIZE_NAMES, ""), count)
            return tuple(
                Phrase(str(noun), colour, str(size)) for noun, colour, size in zip(nouns, colours, sizes, strict=True)
            )


def spoken(objects, arrangement, prefix, words, choices):
    phrases = [object_phrase(*thing) for thing in objects]
    return caption(phrases, arrangement, ((prefix + 0.5) / len(PREFIXES), (words + 0.5) / choices))


@pytest.mark.parametrize("prefix", range(len(PREFIXES)))
def test_single_objects_are_understood_in_every_wording(prefix):
    rng = np.random.default_rng(prefix)
    for place, choices in PLACE_WORDS.items():
        for words in range(len(choices)):
            objects = random_objects(rng, 1)
            text = spoken(objects, PLACES.index(place), prefix, words, len(choices))
            assert parse(text) == Parsed(objects, place), text


@pytest.mark.parametrize("prefix", range(len(PREFIXES)))
def test_pairs_are_understood_in_every_wording(prefix):
    rng = np.random.default_rng(10 + prefix)
    for relation, choices in RELATION_WORDS.items():
        for words, _ in itertools.product(range(len(choices)), range(10)):
            objects = random_objects(rng, 2)
            text = spoken(objects, RELATIONS.index(relation), prefix, words, len(choices))
            assert parse(text) == Parsed(objects, relation), text


def test_triples_are_understood():
    rng = np.random.default_rng(20)
    for prefix in (*range(len(PREFIXES)),) * 20:
        objects = random_objects(rng, 3)
        assert parse(spoken(objects, -1, prefix, 0, 1)) == Parsed(objects, "")


def test_every_choice_of_wording_is_reached():
    phrases = ["a lemon", "a leaf"]
    wordings = np.random.default_rng(0).random((300, 2)).tolist()
    texts = {caption(phrases, RELATIONS.index("left"), (one, other)) for one, other in wordings}
    assert len(texts) == len(set(PREFIXES)) * len(RELATION_WORDS["left"])


def test_capitals_and_punctuation_do_not_matter():
    assert parse("A Big, RED circle -- left of\n a lemon!") == parse("a big red circle left of a lemon")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a red cirle", "The organism knows no word `cirle`; did you mean `circle`?"),
        ("a red circle and a elefant", "The organism knows no word `elefant`; did you mean"),
        ("", "is not of the organism's grammar; say for example"),
        ("red circle", "is not of the organism's grammar"),
        ("left of a red circle", "is not of the organism's grammar"),
        ("a red circle left of", "is not of the organism's grammar"),
        ("a red circle a blue square", "is not of the organism's grammar"),
        ("a red circle and a blue square on the left", "is not of the organism's grammar"),
        ("a red circle left of a blue square and a leaf", "is not of the organism's grammar"),
        ("a lemon and a leaf and a carrot and a tomato", "is not of the organism's grammar"),
        ("there is there is a lemon", "is not of the organism's grammar"),
        ("a red big circle", "is not of the organism's grammar"),
        ("a circle left of a lemon", "gives the circle no colour, but shapes need one."),
        ("a red ring and a red ring", "it names a red ring twice"),
        ("a big red ring above a small red ring", "it names a red ring twice"),
        ("a lemon and a yellow lemon", "it names a yellow lemon twice"),
        ("a leaf and a blue cross and a leaf", "it names a green leaf twice"),
    ],
)
def test_what_is_no_caption_is_refused_in_one_sentence(text, told):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a blue lemon left of a lemon", "a blue lemon and a red lemon"])
def test_concepts_that_would_be_drawn_alike_are_refused_whatever_colour_they_are_given(text):
    with pytest.raises(UserError, match="it names a yellow lemon twice"):
        parse(text)


def test_phrases_take_the_right_article():
    assert object_phrase("circle", "orange") == "an orange circle"
    assert object_phrase("leaf") == "a leaf"
    assert object_phrase("circle", "orange", "big") == "a big orange circle"
