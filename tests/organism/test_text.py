"""The text encoders learn words and positions, and no more."""

import jax
import numpy as np
import pytest

from difffract_jax.models.tokenizers import encode_prompt
from difffract_jax.organism import text
from difffract_jax.organism.recipe import TextRecipe
from difffract_jax.organism.vocabulary import CLIP_TOKENS, TEXT_TOKENS, WORDS, make_tokenizers
from difffract_jax.organism.world import scenes
from tolerances import TOL, relative_error

CAPTION = "a picture of a big red circle left of a lemon"


@pytest.fixture(scope="module")
def tokenizers():
    return make_tokenizers()


@pytest.fixture(scope="module")
def fitted(stages):
    """The state before training, and after a few steps on fixed prompts, with the metrics of every step."""
    state, prompts, metrics = stages.text.init(), stages.text.batch(0), []
    for _ in range(stages.text.steps):
        state, measured = stages.text.step(state, prompts, stages.text.key)
        metrics.append({name: float(value) for name, value in measured.items()})
    return stages.text.init(), state, metrics


@pytest.fixture(params=["before", "after"])
def state(request, fitted):
    return fitted[request.param == "after"]


def shuffled(caption, seed):
    """A caption with its words in another order, and that order."""
    words = caption.split()
    order = np.random.default_rng(seed).permutation(len(words))
    return " ".join(words[place] for place in order), order


def test_tokenising_many_gives_the_ids_of_encoding_one(tokenizers):
    captions = (*scenes(0, 0, 40).captions, *scenes(0, 0, 5, "held out", (3,)).captions, "", " ".join(WORDS[:18]))
    many = text.tokenise(tokenizers, captions)
    for row, caption in enumerate(captions):
        one = encode_prompt(tokenizers, caption, TEXT_TOKENS)
        np.testing.assert_array_equal(many.t5_ids[row], one.t5_ids)
        np.testing.assert_array_equal(many.clip_ids[row], one.clip_ids)
        assert {WORDS[place] for place in np.flatnonzero(many.present[row])} == set(caption.split())


def test_codes_are_orthogonal_and_of_half_a_states_variance():
    tokens, positions = text.token_codes(3)
    codes = np.concatenate([tokens, positions]).astype(np.float64)
    width = text.t5_config().d_model
    assert tokens.shape == (text.t5_config().vocab, width) and positions.shape == (TEXT_TOKENS, width)
    assert relative_error(codes @ codes.T, width / 2 * np.eye(len(codes))) <= TOL.f32_block
    assert np.mean(np.square(tokens[:, None] + positions)) == pytest.approx(1, abs=1e-6)  # as float32 rounds


def test_codes_depend_on_the_seed_alone():
    np.testing.assert_array_equal(text.token_codes(1)[0], text.token_codes(1)[0])
    assert not np.array_equal(text.token_codes(1)[0], text.token_codes(2)[0])


def test_a_step_has_its_own_prompts_half_captions_half_words(tokenizers):
    recipe = TextRecipe(batch=40)
    first, again, other = (text.batch(recipe, tokenizers, 5, step) for step in (0, 0, 1))
    np.testing.assert_array_equal(first.t5_ids, again.t5_ids)
    assert not np.array_equal(first.t5_ids, other.t5_ids)
    assert first.t5_ids.shape == (40, TEXT_TOKENS) and first.clip_ids.shape == (40, CLIP_TOKENS)
    captions = text.tokenise(tokenizers, scenes(5, 0, 20).captions)
    np.testing.assert_array_equal(first.t5_ids[:20], captions.t5_ids)
    # Every prompt is closed; random ones start with any word, captions with few.
    assert np.all((first.t5_ids == tokenizers.t5.eos_token_id).sum(axis=1) == 1)
    assert np.all((first.clip_ids == tokenizers.clip.eos_token_id).any(axis=1))
    assert len(set(first.t5_ids[20:, 0])) > len(set(first.t5_ids[:20, 0]))


def test_a_few_steps_lower_the_losses_of_both_encoders(fitted):
    metrics = fitted[2]
    for name in ("t5", "clip", "loss"):
        assert metrics[-1][name] < 0.9 * metrics[0][name], name
    assert metrics[0]["loss"] == pytest.approx(metrics[0]["t5"] + metrics[0]["clip"])


def test_clips_position_table_stays_zero(state):
    assert not np.any(state.clip.positions.embedding[...])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clips_pooled_state_does_not_depend_on_the_order_of_words(state, tokenizers, seed):
    prompts = text.tokenise(tokenizers, (CAPTION, shuffled(CAPTION, seed)[0], "a big red circle"))
    pooled = text.encode_all(state.t5, state.clip, prompts)[1]
    # Attention sums over the words, in another order: equal but for rounding.
    assert relative_error(pooled[1], pooled[0]) <= TOL.f32_block
    assert relative_error(pooled[2], pooled[0]) > 100 * TOL.f32_block


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t5s_states_do_depend_on_the_order_of_words(state, tokenizers, seed):
    other, order = shuffled(CAPTION, seed)
    states = np.asarray(text.encode_all(state.t5, state.clip, text.tokenise(tokenizers, (CAPTION, other)))[0])
    # Word by word: the same words' states in both captions.
    assert relative_error(states[1, : len(order)], states[0, order]) > 100 * TOL.f32_block


def test_encoding_many_is_encoding_one_by_one(fitted, tokenizers):
    _, state, _ = fitted
    prompts = text.tokenise(tokenizers, scenes(0, 1, 3).captions)
    states, pooled = text.encode_all(state.t5, state.clip, prompts)
    encode = jax.jit(lambda t5, clip, ids, clip_ids: (t5(ids), clip(clip_ids)[1]))
    for row in range(3):
        one = encode(state.t5, state.clip, prompts.t5_ids[row], prompts.clip_ids[row])
        assert relative_error(states[row], one[0]) <= TOL.f32_block
        assert relative_error(pooled[row], one[1]) <= TOL.f32_block


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_the_shortest_runs_have_a_schedule_too(steps):
    weights = np.ones(3, np.float32)
    optimizer = text._optimizer(TextRecipe(steps=steps))
    assert np.all(np.isfinite(optimizer.update(weights, optimizer.init(weights))[0]))
