"""What makes training of FLUX's size possible: arrays born on their devices, one site at a time, few dead features."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import revival
from difffract_jax.transcoders.recipe import takes_turns
from difffract_jax.transcoders.revival import revived, row_cutoffs
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import abstract_state, born, first_state, set_up
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.state import Moments, init_params, init_state, measure_moments, place, state_shardings
from difffract_jax.transcoders.step import ActivationRows, Objective, Recipe, jit_step, optimizer, train_step
from difffract_jax.transcoders.transcoder import TranscoderConfig
from tolerances import TOL, relative_error

WIDTH, ROWS, FEATURES = 16, 32, 64
MESHES = ({"data": 2, "site": 2, "feature": 2}, {"site": 2, "feature": 4}, {"feature": 8})


def flux_setup(mesh, **more):
    """FLUX's 38 sites of double-stream blocks, at a width of 16."""
    given = {"model": "m", "prompts": "p", "expansion": 4, "k": 4, "aux_k": 8, "time_embed": 8, "batch": 64}
    sites = sites_of({"img": range(19), "txt": range(19)})
    return set_up(TrainConfig(**(given | {"buffer_rows": 256} | more)), sites, WIDTH, make_mesh(mesh))


def moments(setup):
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2, len(setup.sites.names), WIDTH), np.float32)
    scales = rng.uniform(1, 2, (2, len(setup.sites.names))).astype(np.float32)
    return Moments(*map(jnp.asarray, (*means, *scales)))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_first_state_of_38_sites_is_born_on_all_devices(mesh):
    setup = flux_setup(mesh)
    state = first_state(setup, moments(setup))
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= 38 * FEATURES]
    assert (
        len(large) == 3 * 6 + 1
    )  # weights and both moments of time_in, time_out, film, enc, dec, enc.bias; and silent
    for leaf in large:
        assert leaf.sharding.device_set == set(jax.devices()), leaf.shape
    split = mesh.get("site", 1) * mesh["feature"]
    for leaf in (state.params.enc.kernel[...], state.params.dec.kernel[...], state.silent):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // split}
    # It is one compiled program, whose own results lie so: nothing is made elsewhere and moved.
    program = born(setup).lower(moments(setup)).compile()
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(setup))
    for ours, expected, leaf in zip(*map(jax.tree.leaves, (program.output_shardings, wanted, state)), strict=True):
        assert ours.is_equivalent_to(expected, leaf.ndim)


def test_it_is_the_state_of_one_device():
    one, many = (first_state(setup, moments(setup)) for setup in (flux_setup({}), flux_setup(MESHES[0])))
    for ours, expected in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        if np.any(expected):
            assert relative_error(ours, expected) <= TOL.sharded
        else:
            assert not np.any(ours)


def test_the_buffer_is_born_on_all_devices_also_where_sites_do_not_divide():
    setup = flux_setup(MESHES[0])  # 19 sites of a group over 2
    store = buffers.empty_store(setup.sites, setup.width, setup.plan.capacity, setup.dtype, setup.mesh)
    for rows in store.values():
        for leaf in rows[:2]:
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}


@cache
def make(kind, sites=4, **more):
    config = TranscoderConfig(d_model=WIDTH, features=FEATURES, time_embed=8, activation=kind, k=4 * ("topk" in kind))
    constants = {"aux_weight": 1 / 4, "aux_k": 8, "dead_after": 100} if "topk" in kind else {}
    recipe = Recipe(objective=Objective(**constants), lr=1e-2, clip=1.0, project_decoder=True, steps=12, **more)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, sites, ROWS, WIDTH), np.float32)
    y = np.tanh(x @ rng.standard_normal((sites, WIDTH, WIDTH), np.float32)) * np.float32(3)
    t = rng.choice(np.float32([1, 0.5]), (6, sites, ROWS))
    batches = [ActivationRows(*map(jnp.asarray, rows)) for rows in zip(x, y, t, strict=True)]
    known = measure_moments(batches[0], scaled=True)
    params = init_params(jax.random.key(0), config, "tied", known)
    state = init_state(params, optimizer(recipe), known, jnp.full(sites, 0.01))
    return state._replace(silent=jnp.asarray(rng.integers(0, 150, (sites, FEATURES)), jnp.int32)), recipe, batches


def after(state, step, batches):
    seen = []
    for rows in batches:
        state, metrics = step(state, rows)
        seen.append(metrics)
    return [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(t)]) for t in (state, seen)
    ]


def on(mesh, state, recipe, batches):
    mesh = make_mesh(mesh)
    placed = place(jax.tree.map(jnp.copy, state), state_shardings(state, mesh))
    return after(placed, jit_step(recipe, mesh, state), batches)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("batchtopk", {}), ("batchtopk", MESHES[0]), pytest.param("relu", MESHES[0], marks=pytest.mark.slow)],
    ids=str,
)
def test_sites_in_turn_train_as_all_together_do(kind, mesh):
    state, recipe, batches = make(kind)
    together = on({}, state, recipe, batches)
    for ours, expected in zip(on(mesh, state, replace(recipe, in_turn=True), batches), together, strict=True):
        assert relative_error(ours, expected) <= TOL.sharded


def test_in_turn_what_lies_between_two_steps_exists_for_one_site():
    def bytes_of(sites, in_turn):
        state, recipe, batches = make("batchtopk", sites, in_turn=in_turn)
        memory = jit_step(recipe, make_mesh({}), state).lower(state, batches[0]).compile().memory_analysis()
        return memory.temp_size_in_bytes, sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / sites

    (few, state), (many, _) = bytes_of(2, True), bytes_of(8, True)
    assert many - few <= 6 * 1.1 * state, "on a CPU six sites more cost a second copy of their state, and no more"
    together = bytes_of(8, False)[0] - bytes_of(2, False)[0]
    assert together >= 6 * 2 * state, "else there would be nothing to save"


def test_the_choice_goes_by_the_bytes_of_a_site_on_a_device():
    def chosen(mesh, **more):
        setup = flux_setup(mesh, batch=4096, buffer_rows=4096, **more)
        shape = replace(setup.shape, features=49_152)
        return takes_turns(setup.settings, shape, setup.mesh.shape)

    assert chosen({}) and not chosen({}, sites_at_once="all")
    assert chosen({"data": 2, "feature": 4}) and not flux_setup({}).recipe.in_turn
    assert flux_setup({}, sites_at_once="one").recipe.in_turn


def dense(u, kernel, dead, most):
    """The definition: the largest of a row's dead features, and a product over all features."""
    values, index = jax.lax.top_k(jnp.where(dead[None], u, -jnp.inf), most)
    z = jnp.zeros_like(u).at[jnp.arange(u.shape[0])[:, None], index].set(jax.nn.relu(values))
    return z @ kernel


@pytest.mark.parametrize("mesh", [None, {"data": 2, "feature": 4}], ids=str)
def test_dead_features_in_blocks_are_the_dense_product_and_its_gradient(monkeypatch, mesh):
    monkeypatch.setattr(revival, "BLOCK", 16)
    keys = jax.random.split(jax.random.key(1), 4)
    u, g = jax.random.normal(keys[0], (ROWS, 104)), jax.random.normal(keys[1], (ROWS, WIDTH))
    kernel, drawn = jax.random.normal(keys[2], (104, WIDTH)), np.asarray(jax.random.uniform(keys[3], 104))

    @partial(jax.jit, static_argnums=0)
    def both_ways(function, u, kernel, dead, g):
        y, pull = jax.vjp(partial(function, dead=dead, most=7), u, kernel)
        return y, *pull(g)

    ours = partial(revived, mesh=None if mesh is None else make_mesh(mesh))
    for share in (0.0, 0.05, 0.4, 1.0):
        found, expected = (both_ways(function, u, kernel, drawn < share, g) for function in (ours, dense))
        for mine, theirs in zip(found, expected, strict=True):
            if np.any(theirs):
                assert relative_error(mine, theirs) <= TOL.f32_block, share
            else:
                assert not np.any(mine), share


@pytest.mark.parametrize("most", [1, 5, 40])
def test_a_cutoff_is_the_value_below_the_last_that_counts(most):
    u = jax.random.normal(jax.random.key(0), (20, 60)) * jnp.logspace(-20, 20, 20)[:, None]
    dead = jnp.arange(60) % 3 > 0
    cut = np.asarray(row_cutoffs(u, dead, most))
    largest = -np.sort(-np.where(dead, u, 0), axis=1)
    wanted = np.maximum(largest[:, most], 0) if most < 40 else np.zeros(20)
    assert np.array_equal(cut, wanted)


def test_the_auxiliary_loss_multiplies_no_more_than_a_block_of_dead_features(monkeypatch):
    """A product over all features, and two for its gradient, would be 6 * rows * features * width operations more."""
    monkeypatch.setattr(revival, "BLOCK", 4)

    def flops(weight):
        state, recipe, batches = make("batchtopk", 1)
        recipe = replace(recipe, objective=replace(recipe.objective, aux_weight=weight))
        lowered = jax.jit(partial(train_step, recipe=recipe)).lower(state, batches[0])
        return lowered.compile().cost_analysis()["flops"]

    assert 0 < flops(1 / 32) - flops(0.0) < 0.5 * 6 * ROWS * FEATURES * WIDTH


def test_a_buffer_of_several_processes_must_be_on_the_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="buffer: host is for one process; use buffer: device"):
        flux_setup({"data": 8}, buffer="host")
