"""The pooled path: modulations add up to the exchange of the pooled embedding, and words to modulations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.attribution.pooled_path import POINTS, integrate
from difffract_jax.circuits.attribution.pooled_words import word_parts
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.models.pipeline import encode, plan_run, step_inputs
from difffract_jax.models.tokenizers import encode_prompt
from tolerances import TOL, relative_error
from traces import EXPLAINED, make_exact


@pytest.fixture(scope="module")
def engine(traced):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return make_engine(traced.trace, traced.tcs, (velocity_of(traced),))


@pytest.fixture(scope="module")
def rows(traced, engine):
    """The velocity and a feature."""
    with jax.enable_x64(True):
        return np.array([engine.sources, target_row(engine, strongest_feature(traced.trace, traced.tcs, "img", 2))])


@pytest.fixture(scope="module")
def by_parts(traced, engine, rows):
    """The effects with one, two and four parts of the line."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        return {parts: integrate(engine, rows, traced.pipe, parts) for parts in (1, 2, 4)}


def velocity_of(traced):
    return resolve_target(traced.pipe, traced.trace, parse_target("velocity:"))


def test_modulations_add_up_to_the_exchange_and_the_error_falls_with_the_number_of_points(by_parts):
    sizes = {parts: np.abs(one.edges).sum(axis=1) for parts, one in by_parts.items()}
    errors = {parts: np.abs(one.remainder) / sizes[parts] for parts, one in by_parts.items()}
    assert np.all(errors[4] <= TOL.conservation_x64)
    assert np.all(errors[1] > 3 * errors[2]) and np.all(errors[2] > 3 * errors[4])
    for parts, one in by_parts.items():
        assert one.points == POINTS * parts and not one.rounding.any()
        assert np.all(np.abs(one.swap) > 1e-3 * sizes[parts])
        # What the parts of the line miss is the remainder, but for signs.
        assert np.all(np.abs(one.remainder) <= one.missed + 1e-12 * sizes[parts])


@pytest.mark.slow
def test_a_modulations_edge_is_the_integral_of_its_slope_by_finite_differences(x64, traced, engine, by_parts):
    """The last norm's scale is taken at other points of the line than all else, in a run of the model's own blocks."""
    model, info, found = traced.pipe.transformer, traced.trace.info, by_parts[4]
    run = plan_run(traced.pipe.config, steps=len(info.sigmas) - 1, height=24, width=32, text_tokens=info.text_tokens)
    one, other = (encode(traced.pipe, prompt, info.text_tokens) for prompt in (info.prompt, ""))
    inputs = step_inputs(run, one, traced.trace.record.latents, info.step)
    direction = engine.outputs[0].velocity

    def conditioned(at):
        return model.embed(inputs._replace(pooled=other.pooled + at * (one.pooled - other.pooled)), info.grid)

    def final_scale(at, moved):
        """The velocity at a point of the line, the last norm's scale at another."""
        (_, cond), (_, there) = conditioned(at), conditioned(moved)
        added = (
            jnp.zeros_like(model.final.modulations(cond))
            .at[1]
            .set((model.final.modulations(there) - model.final.modulations(cond))[1])
        )
        return jnp.sum(direction * model.final(streams(at).img, cond, modulation=added))

    def streams(at):
        h, cond = conditioned(at)
        for stack in (model.double, model.single):
            from_layers = range(jax.tree.leaves(stack)[0].shape[0])
            joined = (h.img, h.txt) if stack is model.double else (jnp.concatenate([h.txt, h.img]),)
            for layer in from_layers:
                block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
                joined, _ = block(joined, cond)
            text = h.txt.shape[0]
            h = h._replace(
                img=joined[0] if stack is model.double else joined[0][text:],
                txt=joined[1] if stack is model.double else joined[0][:text],
            )
        return h

    small = 1e-5
    slope = jax.jit(lambda at: (final_scale(at, at + small) - final_scale(at, at - small)) / (2 * small))
    points, shares = np.polynomial.legendre.leggauss(16)
    expected = sum(share / 2 * float(slope((point + 1) / 2)) for point, share in zip(points, shares, strict=True))
    places = found.places
    last = int(np.flatnonzero((places.block == info.layout.depth) & (places.row == 1))[0])
    assert found.edges[0, last] == pytest.approx(expected, rel=1e-7)
    # Nothing answers the last norm's scale, so that shift and scale move the velocity as they are exchanged.
    with_shift = int(np.flatnonzero((places.block == info.layout.depth) & (places.row == 0))[0])
    assert found.alone[0, with_shift] == pytest.approx(found.edges[0, with_shift], rel=1e-9)


def test_a_modulation_alone_is_an_intervention_on_the_model(x64, traced, engine, by_parts):
    """A block's gate, exchanged in its weights' place: the bias of its projection makes up the difference."""
    model, info, found = traced.pipe.transformer, traced.trace.info, by_parts[1]
    run = plan_run(traced.pipe.config, steps=len(info.sigmas) - 1, height=24, width=32, text_tokens=info.text_tokens)
    one, other = (encode(traced.pipe, prompt, info.text_tokens) for prompt in (info.prompt, ""))
    inputs = step_inputs(run, one, traced.trace.record.latents, info.step)
    conds = [model.embed(inputs._replace(pooled=each.pooled), info.grid)[1] for each in (one, other)]
    mods = [jax.vmap(lambda block, cond=cond: block.modulations(cond)[0])(model.single) for cond in conds]
    before, number, row = float(value_of(model, inputs, info, engine)), 1, 2
    width = model.config.d_model
    changed = jax.tree.map(lambda leaf: leaf, model)
    added = mods[1][number, row] - mods[0][number, row]
    changed.single.mod.bias[...] = changed.single.mod.bias.at[number, row * width : (row + 1) * width].add(added)
    moved = before - float(value_of(changed, inputs, info, engine))
    places = found.places
    block = info.layout.firsts[1] + number
    mine = int(np.flatnonzero((places.block == block) & (places.row == row))[0])
    assert found.alone[0, mine] == pytest.approx(moved, rel=1e-9)
    assert found.change[mine] == pytest.approx(float(jnp.linalg.norm(added)), rel=1e-9)


@jax.jit
def velocity(model, inputs):
    return model(inputs, (3, 4))


def value_of(model, inputs, info, engine):
    assert info.grid == (3, 4)
    return jnp.sum(engine.outputs[0].velocity * velocity(model, inputs))


def test_words_and_what_clip_misses_add_up_to_each_modulation(traced, by_parts):
    found, info = by_parts[4], traced.trace.info
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        words = word_parts(traced.pipe, info.prompt, info.text_tokens, found.weights[0], found.exchanged[0])
    scale = np.abs(words.edges).sum(axis=1) + np.abs(words.missed)
    apart = words.edges.sum(axis=1) + words.missed - found.edges[0]
    assert np.all(np.abs(apart) <= TOL.conservation_x64 * scale)
    assert words.place.size == len(words.text) and words.place[0] > 0 and np.abs(words.edges).max() > 0


def test_a_words_part_is_the_mean_slope_of_its_embedding_between_the_prompts(traced, by_parts):
    info, weights = traced.trace.info, by_parts[1].weights[0]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        words = word_parts(traced.pipe, info.prompt, info.text_tokens, weights, by_parts[1].exchanged[0])
        clip, small = traced.pipe.clip, 1e-6
        ids, empty = (tokens(traced.pipe, prompt, info) for prompt in (info.prompt, ""))
        at, before = clip.embedded(ids), clip.embedded(empty)
        word = int(words.place[1])

        @jax.jit
        def slope(place):
            def pooled(share):
                here = before + place * (at - before)
                return clip.encode_embedded(here.at[word].add(share * (at - before)[word]), ids)[1]

            return (pooled(small) - pooled(-small)) / (2 * small)

        places, shares = np.polynomial.legendre.leggauss(16)
        mean = sum(share / 2 * np.asarray(slope((place + 1) / 2)) for place, share in zip(places, shares, strict=True))
        all_words = np.asarray(clip.encode_embedded(at, ids)[1] - clip.encode_embedded(before, ids)[1])
    assert relative_error(words.edges[:, 1], weights @ mean) <= 1e-6
    # All words together make what CLIP does between the two prompts, read at one place, up to the integral's points.
    assert relative_error(words.edges.sum(axis=1), weights @ all_words) <= 1e-5


def tokens(pipe, prompt, info):
    return encode_prompt(pipe.tokenizers, prompt, info.text_tokens).clip_ids


@pytest.mark.slow
def test_in_float32_they_add_up_too():
    exact = make_exact(**EXPLAINED, dtype=jnp.float32)
    engine = make_engine(exact.trace, exact.tcs, (velocity_of(exact),))
    found = integrate(engine, np.array([engine.sources]), exact.pipe, 2)
    size = np.abs(found.edges).sum()
    assert abs(found.remainder[0]) <= 3e-6 * size
    words = word_parts(exact.pipe, exact.trace.info.prompt, 16, found.weights[0], found.exchanged[0])
    scale = np.abs(words.edges).sum(axis=1) + np.abs(words.missed)
    apart = words.edges.sum(axis=1) + words.missed - found.edges[0]
    assert np.all(np.abs(apart) <= TOL.conservation_f32 * scale)
