"""Probes find what was planted, and the replacement test changes nothing where there is nothing to lose."""

import numpy as np
import pytest

from difffract_jax.organism import probe
from difffract_jax.organism.captions import COLOUR_NAMES
from difffract_jax.organism.evaluate import held_out
from difffract_jax.organism.render import NOUNS
from difffract_jax.organism.text import encode_all, token_codes, tokenise
from difffract_jax.organism.world import scenes
from tolerances import TOL, relative_error


def read_off(weights, states):
    return (np.c_[states, np.ones(len(states))] @ weights).argmax(axis=1)


def planted(size, seed, strength):
    """States that hold their colour in a fixed direction each, in noise, away from the origin."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, len(COLOUR_NAMES), size)
    directions = np.random.default_rng(99).standard_normal((len(COLOUR_NAMES), 24))
    return strength * directions[colours] + rng.standard_normal((size, 24)) + 5, colours


def words_and_positions(t5, clip, prompts):
    """What a T5 that learned its task perfectly would give; CLIP's part is not looked at."""
    tokens, positions = token_codes(0)
    return tokens[prompts.t5_ids] + positions, None


def neighbours_too(t5, clip, prompts):
    """A T5 whose states hold their left neighbour as well."""
    states = words_and_positions(t5, clip, prompts)[0]
    return states + np.roll(token_codes(0)[0][prompts.t5_ids], 1, axis=1), None


def test_the_ridge_recovers_what_was_planted():
    weights = probe._ridge(*planted(1000, 0, 2.0))
    states, colours = planted(1000, 1, 2.0)
    assert np.mean(read_off(weights, states) == colours) > 0.95


def test_the_ridge_finds_nothing_where_nothing_is():
    weights = probe._ridge(*planted(1000, 0, 0.0))
    states, colours = planted(2000, 1, 0.0)
    chance = 1 / len(COLOUR_NAMES)
    assert abs(np.mean(read_off(weights, states) == colours) - chance) < 5 * np.sqrt(chance * (1 - chance) / 2000)


def test_nouns_are_found_with_the_colours_that_captions_give_them():
    asked = held_out(50, "two shapes")
    rows, positions, colours = probe._nouns(asked)
    assert len(rows) == 100
    words = [caption.split() for caption in asked.captions]
    assert [words[row][place] for row, place in zip(rows, positions, strict=True)] == [
        NOUNS[kind] for kind in asked.kind[:, :2].ravel()
    ]
    np.testing.assert_array_equal(colours, asked.colour[:, :2].ravel())


def test_training_contents_for_the_probe_name_both_colours():
    asked = probe._shapes_only(40, "train")
    assert len(asked.captions) == 40 and not asked.held_out.any()
    np.testing.assert_array_equal(asked.named[:, :2], asked.colour[:, :2])


def test_every_place_is_probed_on_every_noun(organism):
    rows = probe.probe_binding(organism, 32)
    assert [row["what"] for row in rows] == [
        "before T5",
        "after T5",
        "txt entering",
        "txt after double/0",
        "txt after double/1",
        "txt after single/0",
    ]
    assert all(row["images"] == 64 and 0 <= row["right"] <= 64 for row in rows)


def test_a_state_that_holds_the_colour_is_read_and_one_that_does_not_is_not(organism, monkeypatch):
    """`after T5` holds the left neighbour, which is the colour; `before T5` holds the noun alone."""
    monkeypatch.setattr(probe, "encode_all", neighbours_too)
    monkeypatch.setattr(probe, "_block_states", lambda *_: [])
    shares = {row["what"]: row["share"] for row in probe.probe_binding(organism, 300)}
    assert shares["after T5"] == 1
    assert shares["before T5"] < 0.3


@pytest.fixture
def prompts(organism, monkeypatch):
    """A few prompts; the means are taken over fewer captions than usual."""
    monkeypatch.setattr(probe, "scenes", lambda seed, batch, size: scenes(seed, batch, min(size, 100)))
    return tokenise(organism.tokenizers, held_out(8, "two shapes").captions)


def test_states_of_words_and_positions_are_their_own_means(organism, monkeypatch, prompts):
    monkeypatch.setattr(probe, "encode_all", words_and_positions)
    states = words_and_positions(None, None, prompts)[0]
    assert relative_error(probe._means(organism, prompts, states), states) <= TOL.f32_block


def test_states_that_hold_their_neighbours_lose_them(organism, monkeypatch, prompts):
    monkeypatch.setattr(probe, "encode_all", neighbours_too)
    states = neighbours_too(None, None, prompts)[0]
    assert relative_error(probe._means(organism, prompts, states), states) > 0.1


def test_tokens_that_were_never_seen_at_a_position_keep_their_state(organism, monkeypatch, prompts):
    monkeypatch.setattr(probe, "encode_all", neighbours_too)
    unheard = tokenise(organism.tokenizers, ("lemon lemon lemon",))
    states = neighbours_too(None, None, unheard)[0]
    np.testing.assert_array_equal(probe._means(organism, unheard, states)[0, 0], states[0, 0])


def test_the_replacement_test_draws_the_same_images_twice(organism, monkeypatch):
    given = []
    draw = probe._draw

    def watching(pipe, run, text, pooled):
        given.append((np.asarray(text), np.asarray(pooled)))
        return draw(pipe, run, text, pooled)

    monkeypatch.setattr(probe, "_draw", watching)
    monkeypatch.setattr(probe, "_means", lambda pipe, prompts, text: 0 * text)
    rows = probe.replace_text(organism, 3)
    assert [(row["what"], row["images"]) for row in rows] == [
        ("states as they are", 3),
        ("mean of word and position", 3),
    ]
    prompts = tokenise(organism.tokenizers, held_out(3, "two shapes").captions)
    text, pooled = encode_all(organism.t5, organism.clip, prompts)
    np.testing.assert_array_equal(given[0][0], text)
    assert not np.any(given[1][0])
    for _, seen in given:
        np.testing.assert_array_equal(seen, pooled)
