"""What weights say: links both ways, neighbours, gates, and the direct effect on pixels, held against the model."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from scans import PROMPTS, SEED, small

from difffract_jax.circuits.trace.capture import capture
from difffract_jax.dashboards.features import links as by_weights
from difffract_jax.dashboards.features.effects import effects_of, token_pictures
from difffract_jax.dashboards.features.links import find_links, pairs_of, places_of
from difffract_jax.dashboards.features.mean_run import mean_run
from difffract_jax.models.pipeline import decode_raw
from difffract_jax.models.tiny import random_pipeline
from tolerances import TOL, relative_error
from traces import cast, layer_of

FEATURES = 40


@pytest.fixture(scope="module")
def mean():
    corpus = small().corpus
    pooled = np.mean([np.asarray(corpus.batch_of([n]).pooled[0]) for n in range(len(PROMPTS))], axis=0)
    latents = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    return mean_run(corpus, small().tcs.sites, latents, pooled)


@pytest.fixture(scope="module")
def usual():
    rng = np.random.default_rng(1)
    found = {name: rng.uniform(0.5, 2, (len(n), FEATURES)) for name, n in small().tcs.sites.groups.items()}
    found["img"][1, 7] = 0  # never fires
    return found


SIDES = {"img": (0.0, 1.0), "txt": (1.0, 0.0), "joint": (0.25, 0.75)}


def links_of(mean, usual, keep=FEATURES):
    tcs, corpus = small().tcs, small().corpus
    sides = {n: np.broadcast_to(np.float32(SIDES[n]), (*values.shape, 2)).copy() for n, values in usual.items()}
    sides["joint"][1, 3] = 1, 0  # at words alone
    return find_links(tcs, corpus.pipe.config.transformer.layout, mean, corpus.run.sigmas[:-1], usual, sides, keep)


def test_sites_are_linked_to_later_ones_of_the_same_stream():
    places = places_of(small().tcs, small().corpus.pipe.config.transformer.layout)
    names = small().tcs.sites.names
    pairs = {(names[a], names[b]) for a, b in pairs_of(places)}
    assert ("img/0", "img/1") in pairs and ("txt/2", "single/0") in pairs and ("single/0", "single/1") in pairs
    assert ("img/0", "txt/1") not in pairs and ("img/1", "img/1") not in pairs and ("img/2", "img/1") not in pairs
    assert len(pairs) == 3 + 3 + 2 * 6 + 1


def test_weights_are_usual_shares_and_read_the_same_both_ways(mean, usual, monkeypatch):
    monkeypatch.setattr(by_weights, "TILE", 16)  # a site in several tiles
    tcs, names = small().tcs, small().tcs.sites.names
    found = links_of(mean, usual, keep=7 * FEATURES)
    source, target = names.index("img/0"), names.index("single/1")
    one, other = (layer_of(tcs.stacks[g], i) for g, i in (("img", 0), ("joint", 1)))
    alpha = np.mean([other.scale_shift(jnp.float32(t))[0] for t in small().corpus.run.sigmas[:-1]], axis=0)
    written = usual["img"][0][:, None] * np.asarray(one.dec.kernel[...]) * mean.gates["img"][0]
    written -= written.mean(axis=1, keepdims=True)
    read = mean.norms["joint"][1] * np.asarray(other.enc.kernel[...]) * (1 + alpha)[:, None] / usual["joint"][1]
    expected = 0.75 * written @ read  # three in four of its tokens are patches
    expected[:, 3] = 0
    down = np.zeros((FEATURES, FEATURES))
    up = np.zeros((FEATURES, FEATURES))
    for f in range(FEATURES):
        for value, partner in zip(found.downstream.value[source, f], found.downstream.partner[source, f], strict=True):
            if partner // FEATURES == target and value:
                down[f, partner % FEATURES] = value
        for value, partner in zip(found.upstream.value[target, f], found.upstream.partner[target, f], strict=True):
            if partner // FEATURES == source and value:
                up[partner % FEATURES, f] = value
    assert relative_error(down, expected) <= TOL.f32_block and np.array_equal(up, down)


def test_the_strongest_links_are_kept_and_none_of_what_never_fires(mean, usual):
    few, every = links_of(mean, usual, keep=3), links_of(mean, usual, keep=7 * FEATURES)
    for ours, theirs in zip(few, every, strict=True):
        assert np.array_equal(ours.value, theirs.value[:, :, :3])
        assert np.all(np.diff(np.abs(theirs.value), axis=2) <= 0)
    dead = small().tcs.sites.names.index("img/1")
    assert not every.upstream.value[dead, 7].any() and not every.downstream.value[dead, 7].any()


def test_neighbours_are_the_largest_cosines_of_the_site(mean, usual):
    found = links_of(mean, usual, keep=4).neighbours
    for site, (group, slot) in enumerate((g.name, i) for g, n in small().tcs.sites.members for i in range(len(n))):
        vectors = np.asarray(small().tcs.stacks[group].dec.kernel[slot])
        cosine = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
        np.fill_diagonal(cosine, -1)
        order = np.argsort(-cosine, axis=1)[:, :4]
        assert relative_error(found.value[site], np.take_along_axis(cosine, order, axis=1)) <= TOL.f32_block
        assert np.array_equal(found.partner[site] - site * FEATURES, order)


@pytest.fixture(scope="module")
def first():
    """The mean run of a corpus whose mean pooled embedding is that of the first prompt."""
    corpus = small().corpus
    pooled = np.asarray(corpus.batch_of([0]).pooled[0])
    return mean_run(corpus, small().tcs.sites, np.zeros((6, 16), np.float32), pooled)


@cache
def recorded(number, step):
    corpus, tcs = small().corpus, small().tcs
    prompt = PROMPTS[number]
    return capture(corpus.pipe, tcs, prompt, seed=SEED + number, step=step, output=True, run=corpus.run).record


def test_gates_are_those_of_a_recorded_run(first):
    for stack, group, name, slot in (("double", 0, "img", 1), ("double", 1, "txt", 2), ("single", 0, "joint", 1)):
        block = layer_of(getattr(small().corpus.pipe.transformer, stack), slot)
        gates = [np.asarray(block.gates(recorded(0, step).cond)[group]) for step in (0, 1)]
        assert relative_error(first.gates[name][slot], np.mean(gates, axis=0)) <= TOL.f32_run
        assert relative_error(first.last_gates[name][slot], gates[1]) <= TOL.f32_run


def test_norms_are_those_of_recorded_runs(mean):
    norms = []
    for number in range(small().corpus.batch):
        for record in (recorded(number, step) for step in (0, 1)):
            own = np.asarray(record.replaceable[1])
            norms.append(1 / np.sqrt(np.asarray(record.boundary.txt).var(axis=1) + 1e-6)[own])
    assert relative_error(mean.norms["txt"][0], np.mean(np.concatenate(norms))) <= TOL.f32_run


def test_effects_on_pixels_are_differences_of_decoded_images(mean):
    corpus, tcs = small().corpus, small().tcs
    pictures = token_pictures(corpus, mean)
    assert pictures.shape == (16, 16, 24, 3)  # two rows and three columns of tokens
    decoder, usual = np.asarray(tcs.stacks["joint"].dec.kernel[1]), np.linspace(0, 2, FEATURES)
    found = effects_of(decoder, mean.last_gates["joint"][1], usual, mean, pictures)
    assert found.strength[0] == 0 and np.all(found.picture[0] == 128)
    change = (usual[5] * decoder[5] * mean.last_gates["joint"][1]) @ mean.final
    token = 1 * 3 + 1
    size = 1e-2 / np.abs(change).max()
    ends = [mean.latents.copy() for _ in range(2)]
    for sign, end in zip((1, -1), ends, strict=True):
        end[token] += sign * size * change
    after, before = (np.asarray(decode_raw(corpus.pipe.vae, jnp.asarray(end), corpus.run.grid)) / 2 for end in ends)
    difference = (after - before) / (2 * size)
    assert np.abs(difference).max() == pytest.approx(found.strength[5], rel=0.02)
    shown = (found.picture[5].astype(float) - 127.5) / 127.5 * found.strength[5]
    assert np.abs(shown - difference).max() <= 0.02 * found.strength[5]


def test_the_last_layer_is_that_of_the_model(first):
    corpus, record = small().corpus, recorded(0, 1)
    last = np.concatenate([np.asarray(recorded(number, 1).inv_std) for number in range(corpus.batch)])
    h = np.random.default_rng(2).standard_normal((2, 32)).astype(np.float32)
    scale = jnp.full(2, last.mean(), jnp.float32)
    out = np.asarray(corpus.pipe.transformer.final(jnp.asarray(h), record.cond, scale))
    expected = -float(corpus.run.sigmas[1]) * (out[1] - out[0])
    assert relative_error((h[1] - h[0]) @ first.final, expected) <= TOL.f32_run


def test_the_last_layer_of_weights_in_bfloat16_is_not_lost_to_rounding():
    pipe, finals = random_pipeline(dtype=jnp.bfloat16), []
    pipe.transformer.final.proj.bias[...] += 50  # a constant, beside which one unit more is small
    for each in (pipe, pipe._replace(transformer=cast(pipe.transformer, jnp.float32))):
        corpus = replace(small().corpus, pipe=each)
        pooled = np.asarray(corpus.batch_of([0]).pooled[0], np.float32)
        finals.append(mean_run(corpus, small().tcs.sites, np.zeros((6, 16), np.float32), pooled).final)
    assert np.linalg.norm(finals[0] - finals[1]) <= 0.02 * np.linalg.norm(finals[1])
