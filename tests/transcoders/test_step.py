"""The training step: the reference's own steps, one compilation, the same numbers on any arrangement of devices."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from converters.mapping import ArraySource, load_tree, save_tree
from converters.transcoders import TRANSCODER_TORCH, stacked_transcoders
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.objective import ActivationRows, Objective, site_loss
from difffract_jax.transcoders.revival import matmul
from difffract_jax.transcoders.state import (
    Moments,
    TrainState,
    export_transcoders,
    init_params,
    init_state,
    measure_moments,
    place,
    state_shardings,
)
from difffract_jax.transcoders.step import (
    Recipe,
    across,
    jit_step,
    optimizer,
    pmap_step,
    rate,
    repeat_state,
    split_rows,
    train_step,
)
from difffract_jax.transcoders.transcoder import TranscoderConfig
from tolerances import REFERENCE, TOL, relative_error

SITES, ROWS, WIDTH, FEATURES = 4, 32, 16, 64


def from_torch(state, config):
    """The stacked transcoders of one state dict of the reference."""
    arrays = {f"site.{key}": array for key, array in state.items()}
    abstract = stacked_transcoders(config, 1, jnp.float32)
    return load_tree(ArraySource("golden", arrays), TRANSCODER_TORCH, abstract, labels={"site": ["site"]})


def to_torch(stack):
    return {k.removeprefix("site."): v for k, v in save_tree(stack, TRANSCODER_TORCH, labels={"site": ["site"]})}


def tensors(data, prefix):
    return {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}


def unscaled(sites, width):
    """The moments of rows that are left as they are."""
    return Moments(jnp.zeros((sites, width)), jnp.zeros((sites, width)), jnp.ones(sites), jnp.ones(sites))


@pytest.mark.parametrize("role", ["transcoder", "sae"])
def test_forty_steps_are_the_reference_s(role):
    data = np.load(REFERENCE / f"golden_training_{role}.npz")
    lr, l1, b1, b2, eps, decay = map(float, data["hyper"])
    features, width = data["init.encoder.weight"].shape
    config = TranscoderConfig(d_model=width, features=features, time_embed=16, conditioning="film_raw_t", role=role)
    recipe = Recipe(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=decay, steps=40)
    moments = unscaled(1, width)
    state = init_state(from_torch(tensors(data, "init."), config), optimizer(recipe), moments, jnp.array([l1]))
    step = jit_step(recipe, make_mesh({}), state)
    y = data["y"]
    x = data["x"] if role == "transcoder" else y
    for number in range(40):
        rows = ActivationRows(*(jnp.asarray(a[number][None]) for a in (x, y, data["t"])))
        state, metrics = step(state, rows)
        ours = [metrics.loss[0], metrics.fvu[0], metrics.l1[0], metrics.l0[0]]
        assert relative_error(ours, data["metrics"][number]) <= TOL.f32_block
        if f"step{number + 1}.encoder.weight" in data.files:
            ours = to_torch(state.params)
            for key, expected in tensors(data, f"step{number + 1}.").items():
                assert relative_error(ours[key], expected) <= TOL.f32_block, f"{key} after {number + 1} steps"


def test_the_cycle_s_rates_are_the_reference_s():
    # Of this file only the rates are used: its `init.*` and `step1.*` are copies of `step6.*`, but for the decoder.
    expected = np.load(REFERENCE / "golden_train_step.npz")["cosine_lr_Tmax8"]
    at = rate(Recipe(lr=1.0, schedule="cosine_cycles", cycle=3, steps=24))
    assert relative_error([at(3 * cycle + 2) for cycle in range(10)], expected) <= TOL.f32_block


KINDS = {
    "relu": ({}, {}),
    "topk": ({"activation": "topk", "k": 4, "skip": True}, {"aux_weight": 1 / 32, "aux_k": 8, "dead_after": 100}),
    "batchtopk": ({"activation": "batchtopk", "k": 4}, {"aux_weight": 1 / 32, "aux_k": 8, "dead_after": 100}),
    "jumprelu": ({"activation": "jumprelu"}, {"bandwidth": 0.2}),
}


@cache
def made(kind):
    shape, constants = KINDS[kind]
    config = TranscoderConfig(d_model=WIDTH, features=FEATURES, time_embed=8, **shape)
    recipe = Recipe(objective=Objective(**constants), lr=1e-2, clip=1.0, project_decoder=True, warmup=2, steps=12)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, SITES, ROWS, WIDTH), np.float32)
    y = np.tanh(x @ rng.standard_normal((SITES, WIDTH, WIDTH), np.float32)) * np.float32(3)
    t = rng.choice(np.float32([1, 0.75, 0.5, 0.25]), (12, SITES, ROWS))
    batches = [ActivationRows(*map(jnp.asarray, rows)) for rows in zip(x, y, t, strict=True)]
    moments = measure_moments(batches[0], scaled=True)
    params = init_params(jax.random.key(0), config, "tied", moments)
    sparsity = jnp.linspace(1, 4, SITES) * (0.01 if kind == "relu" else 1)
    return init_state(params, optimizer(recipe), moments, sparsity), recipe, batches


def make(kind):
    """A state, a recipe, and 12 batches of rows that only some of the features can explain."""
    state, recipe, batches = made(kind)
    return jax.tree.map(lambda leaf: leaf, state), recipe, batches  # modules of its own: tests set their weights


@cache
def stepping(recipe):
    """The step, compiled once for all tests that take it."""
    return jax.jit(partial(train_step, recipe=recipe))


def run(state, step, batches):
    history = []
    for rows in batches:
        state, metrics = step(state, rows)
        history.append(metrics)
    return state, history


def sharded(state, recipe, shape):
    mesh = make_mesh(shape)
    state = jax.tree.map(jnp.copy, state)  # the step may reuse what it is given
    return place(state, state_shardings(state, mesh)), jit_step(recipe, mesh, state)


@pytest.mark.parametrize(
    "kind", ["topk", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("relu", "batchtopk", "jumprelu"))]
)
def test_eight_devices_and_pmap_give_what_one_device_gives(kind):
    state, recipe, batches = make(kind)
    batches = batches[:6]
    one, history = run(*sharded(state, recipe, {}), batches)
    eight, other = run(*sharded(state, recipe, {"data": 2, "site": 2, "feature": 2}), batches)
    assert relative_error(flat(eight), flat(one)) <= TOL.sharded
    assert relative_error(flat(other), flat(history)) <= TOL.sharded
    many, third = run(repeat_state(state, 8), pmap_step(recipe), [split_rows(rows, 8) for rows in batches])
    assert relative_error(flat(jax.tree.map(lambda a: a[0], many)), flat(one)) <= TOL.pmap
    assert relative_error(flat(jax.tree.map(lambda a: a[0], third)), flat(history)) <= TOL.pmap


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_lower_the_error_keep_vectors_at_unit_norm_and_compile_once(kind):
    state, recipe, batches = make(kind)
    state, step = sharded(state, recipe, {})
    before = step._cache_size()  # other tests have the same step
    state, history = run(state, step, batches[:1] * 40)
    assert np.all(history[-1].fvu < 0.7 * history[0].fvu)
    norms = jnp.linalg.norm(state.params.dec.kernel[...], axis=-1)
    assert np.max(np.abs(norms - 1)) <= 1e-6
    assert step._cache_size() <= before + 1


def test_sites_do_not_see_each_other():
    state, recipe, batches = make("topk")
    step = stepping(recipe)
    together, _ = run(state, step, batches[:5])
    alone, _ = run(take_site(state, 2), step, [jax.tree.map(lambda a: a[2:3], r) for r in batches[:5]])
    assert relative_error(flat(alone.params), flat(take_site(together, 2).params)) <= TOL.sharded


def take_site(state, site):
    return TrainState(state.step, *jax.tree.map(lambda a: a[site : site + 1], tuple(state)[1:]))


def test_silent_features_are_counted_and_only_dead_ones_are_revived():
    state, recipe, batches = make("topk")
    state.params.enc.bias[...] = state.params.enc.bias[...].at[:, FEATURES // 2 :].add(-1.5)
    silent = jnp.full((SITES, FEATURES), 90).at[:, 3 * FEATURES // 4 :].set(110)  # dead after 100
    state = state._replace(silent=silent)
    without = replace(recipe, objective=replace(recipe.objective, aux_weight=0.0))
    ends = [stepping(each)(state, batches[0]) for each in (recipe, without)]
    fired = np.asarray(ends[0][0].silent == 0)
    assert np.array_equal(ends[0][0].silent, np.where(fired, 0, silent + ROWS)) and np.any(fired)
    assert np.all(np.asarray(ends[0][1].dead) == 0.25)
    # More than what giving unit vectors unit norm again changes in their last bit.
    changes = [np.asarray(end.params.dec.kernel[...] - state.params.dec.kernel[...]) for end, _ in ends]
    moved = [np.any(np.abs(change) > 1e-5, axis=-1) for change in changes]
    quiet, dead = ~fired, np.asarray(silent) > 100
    assert not np.any(moved[1] & quiet), "without the auxiliary loss nothing reaches a silent feature"
    assert not np.any(moved[0] & quiet & ~dead) and np.mean(moved[0][quiet & dead]) > 0.5


def test_the_threshold_finds_the_wanted_l0():
    state, recipe, batches = make("jumprelu")
    recipe = replace(recipe, lr=2e-3, sparsity_warmup=100, steps=600)
    state = state._replace(sparsity=jnp.full(SITES, 6.0))
    state, history = run(state, stepping(recipe), batches * 50)
    assert np.all(np.abs(np.mean([m.l0 for m in history[-12:]], axis=0) / 6 - 1) < 0.2)
    assert np.all(np.asarray(state.params.threshold[...]) >= 0)


@pytest.mark.parametrize(
    "kind", ["topk", "jumprelu", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("relu", "batchtopk"))]
)
def test_exported_transcoders_act_on_unscaled_rows(kind):
    state, recipe, batches = make(kind)
    state, _ = run(state, stepping(recipe), batches)
    state.params.film.kernel[...] = jax.random.normal(jax.random.key(1), state.params.film.kernel.shape) / 8
    stack, config = export_transcoders(state)
    assert config.activation == ("jumprelu" if kind == "batchtopk" else state.params.config.activation)
    t, rows = jnp.float32(0.5), batches[-1]

    @jax.jit
    @jax.vmap
    def scaled_and_back(state, x):
        u = state.params.preactivation(x / state.x_scale, t)
        z = jnp.where(u > state.cutoff, u, 0) if kind == "batchtopk" else state.params.activate(u)
        return state.params.decode(z, x / state.x_scale) * state.y_scale

    ours = jax.jit(jax.vmap(lambda tc, x: tc(x, t)))(stack, rows.x)
    assert relative_error(ours, scaled_and_back(state._replace(step=()), rows.x)) <= TOL.f32_block


def test_the_removed_gradient_is_the_one_along_the_vector():
    gradient, vectors = jax.random.normal(jax.random.key(0), (2, 5, 7))
    vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    left = across(gradient, vectors)
    assert np.max(np.abs(jnp.sum(left * vectors, axis=1))) <= 1e-6
    assert relative_error(left + jnp.sum(gradient * vectors, axis=1, keepdims=True) * vectors, gradient) <= 1e-6


def test_rates_warm_up_and_fall():
    at = rate(Recipe(lr=2.0, schedule="linear", warmup=4, decay=0.5, steps=20))
    expected = [0.5, 1.0, 1.5, 2.0, 2.0] + [2.0 * min(1, (20 - s) / 10) for s in range(5, 20)]
    assert relative_error([at(s) for s in range(20)], expected) <= 1e-6


def test_bf16_products_change_a_step_by_their_rounding_alone():
    state, recipe, batches = make("relu")
    half = replace(recipe, objective=replace(recipe.objective, bf16=True))
    exact, rounded = (stepping(r)(state, batches[0]) for r in (recipe, half))
    assert 0 < relative_error(rounded[1].loss, exact[1].loss) <= TOL.bf16
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded[0].params)} == {jnp.dtype("float32")}


def test_the_optimiser_is_optax_s_adamw():
    recipe = Recipe(lr=0.1, weight_decay=0.01)
    ours, theirs = (
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))[0]
        for tx in (optimizer(recipe), optax.adamw(0.1, weight_decay=0.01))
    )
    assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.slow)])
def test_a_dead_feature_that_is_always_negative_is_lifted_and_no_other(kind):
    state, _, batches = make(kind)
    shape, rows = state.params.config, jax.tree.map(lambda a: a[0], batches[0])
    tc = jax.tree.map(lambda a: a[0], state.params)
    tc.enc.bias[...] = tc.enc.bias[...].at[:3].set(-50)
    silent = jnp.zeros(shape.features, jnp.int32).at[jnp.array([0, 2])].set(1000)

    def slopes(weight):
        objective = Objective(aux_weight=1 / 32, aux_k=2, dead_after=100, lift_weight=weight)
        loss = jax.jit(jax.grad(site_loss, has_aux=True), static_argnums=6)
        one, zero, yes = jnp.ones(()), jnp.zeros(()), jnp.ones((), bool)
        return np.asarray(loss(tc, rows, silent, zero, yes, one, objective)[0].enc.bias[...])

    without, lifted = slopes(0.0), slopes(1e-3)
    np.testing.assert_array_equal(without[:3], 0)
    np.testing.assert_allclose(lifted[[0, 2]], -1e-3, rtol=TOL.f32_block)  # every row asks for more
    np.testing.assert_array_equal(np.delete(lifted, [0, 2]), np.delete(without, [0, 2]))


@pytest.mark.parametrize("bf16", [False, True])
def test_products_in_float32_keep_their_factors_on_every_machine(bf16):
    """By JAX's default an accelerator would round them to bfloat16, or to 10 bits."""
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    with jax.default_matmul_precision("default"):
        both_ways = jax.make_jaxpr(jax.grad(lambda pair: matmul(*pair, bf16).sum()))((a, b))
    products = [eqn.params for eqn in both_ways.eqns if eqn.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert len(products) >= 2 and all((one["precision"] == highest) != bf16 for one in products)
