"""Many edited images at once are those made one at a time, and an edit writes what it says, whatever the site."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.editing import sweeps
from difffract_jax.circuits.editing.interventions import edit_model, edited_velocity, steer
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.config import UserError
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.models.pipeline import encode, generate, initial_noise, plan_run, step_inputs
from difffract_jax.models.stacks import run_stacks, sequences, slice_layer
from tolerances import TOL, relative_error

PROMPT = "a red circle left of a blue square"
EDITS = [
    Edit.parse(text) for text in ("img/1/f435=set:300", "single/1/f331@img6-12#1,2=zero", "a:txt/1/f229+txt/0/f7=zero")
]


@pytest.fixture(scope="module")
def organism():
    return load_pipeline("organism"), load_transcoders("organism")


@pytest.fixture(scope="module")
def made(organism):
    return sweeps.sweep(*organism, PROMPT, EDITS, (0.0, -2.0), (3, 4))


def test_no_edit_is_the_identity_bit_for_bit(organism, made):
    pipe, tcs = organism
    for row, seed in enumerate(made.seeds):
        plain = generate(pipe, PROMPT, seed=seed)
        assert np.array_equal(steer(pipe, tcs, PROMPT, [], seed=seed).latents, plain.latents)
        assert np.array_equal(made.images[row, 0], plain.image)
    assert not made.norms[:, 0].any()


def test_a_sweep_is_its_images_one_at_a_time(organism, made):
    pipe, tcs = organism
    assert made.columns == ("original", "x 0", "x -2")
    for column, amount in ((1, 0.0), (2, -2.0)):
        one = steer(pipe, tcs, PROMPT, [edit.swept(amount) for edit in EDITS], seed=4)
        assert np.abs(made.images[1, column].astype(int) - one.image).max() <= 1  # a rounding of 8 bits
    assert not np.array_equal(made.images[:, 0], made.images[:, 2])


def test_images_of_one_batch_have_prompts_and_edits_of_their_own(organism, made):
    pipe, tcs = organism
    compiled = sweeps.sample_edited._cache_size()
    stronger = [edit.swept(3.0) for edit in EDITS]
    prompts, edits, seeds = [PROMPT, "a lemon", "a lemon"] * 2, [EDITS, EDITS, stronger] * 2, [0, 0, 1] * 2
    many = sweeps.steer_batch(pipe, tcs, prompts, edits, seeds)
    for row in range(3):
        one = steer(pipe, tcs, prompts[row], edits[row], seed=seeds[row])
        assert relative_error(many.latents[row], one.latents) <= TOL.f32_run
    assert np.array_equal(many.latents[:3], many.latents[3:])
    assert sweeps.sample_edited._cache_size() == compiled  # neither prompts nor strengths nor seeds compile anything


@pytest.mark.parametrize("name", ["organism", pytest.param("organism-saes", marks=pytest.mark.slow)])
def test_an_edit_of_a_single_stream_site_is_what_it_says(organism, name):
    """Recomputed: the code of block 1, set to 50 at an image position, and what that writes."""
    pipe, tcs = organism[0], load_transcoders(name)
    run, model = plan_run(pipe.config), pipe.transformer
    inputs = step_inputs(run, encode(pipe, PROMPT, run.text_tokens), initial_noise(pipe, run, 0), 2)
    edited = edit_model(model, tcs, [Edit.parse("single/1/f40@img7=set:50")], run)
    velocity, size = jax.jit(edited_velocity, static_argnums=(3, 4))(edited, inputs, 2, run.grid, "delta")
    plain, expected, write = by_hand(model, tcs.stacks["joint"], inputs, run.grid, run.text_tokens + 7)
    assert relative_error(velocity, expected) <= TOL.f32_block
    assert float(size) == pytest.approx(float(jnp.sum(write**2)), rel=1e-4)
    assert relative_error(plain, expected) > 10 * TOL.f32_block


@partial(jax.jit, static_argnums=(3, 4))
def by_hand(model, stack, inputs, grid, row):
    """The velocity without the edit, with it, and what feature 40 of single-stream block 1 writes more at a row."""
    h, cond = model.embed(inputs, grid)
    before = sequences(run_stacks(model.stacks[:1], h, cond)[0], model.single.groups)
    first, second = (slice_layer(model.single, number) for number in range(2))
    before, _ = first(before, cond)
    _, acts = second(before, cond)
    tc = slice_layer(stack, 1)
    (read,) = acts.mlp_out if tc.config.role == "sae" else acts.mlp_in
    alpha, beta = tc.scale_shift(inputs.t)
    u = ((1 + alpha) * read[row] + beta) @ tc.enc.kernel[:, 40] + tc.enc.bias[40]
    write = (50 - jnp.where(u > tc.threshold[40], u, 0)) * tc.dec.kernel[40]
    (joint,), _ = second(before, cond, mlp=lambda group, x: second.run_mlp(group, x).at[row].add(write))
    return model(inputs, grid), model.final(joint[inputs.text.shape[0] :], cond), write


def test_padded_text_is_left_alone_unless_asked(organism):
    pipe, tcs = organism
    site = [Edit.parse("txt=scale:-3")]
    few, all_ = (steer(pipe, tcs, "a lemon", site, include_padding=wanted).latents for wanted in (False, True))
    own = steer(pipe, tcs, "a lemon", [Edit.parse("txt/0@0-2=scale:-3"), Edit.parse("txt/1@0-2=scale:-3")]).latents
    assert np.array_equal(few, own)  # two words and the closing token
    assert relative_error(all_, few) > 10 * TOL.f32_run


def test_what_does_not_fit_together_is_refused(organism):
    with pytest.raises(UserError, match="got 2 prompts, 1 lists of edits and 2 seeds"):
        sweeps.steer_batch(*organism, ["a lemon"] * 2, [[]], [0, 1])
    with pytest.raises(UserError, match="A sweep needs at least one seed"):
        sweeps.sweep(*organism, "a lemon", [], seeds=())
    with pytest.raises(UserError, match="form of edits must be one of delta, replace, but got 'both'"):
        sweeps.sweep(*organism, "a lemon", [], form="both")
