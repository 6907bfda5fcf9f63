"""Replacing the outputs of MLPs, one site at a time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import model_velocity, plan_run
from difffract_jax.models.stacks import sequences, slice_layer, streams
from difffract_jax.organism.ablation import ablated_velocity, ablation, mean_outputs, sites
from difffract_jax.organism.flow import GRID, FlowRecipe, transformer_config
from tolerances import TOL, relative_error

IMG, TXT, JOINT = range(3)
SITES = [(IMG, 0), (TXT, 0), (IMG, 1), (TXT, 1), (JOINT, 0)]
STEPS = 3


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    return Inputs(random(0, 36, 32), random(1, 20, 96), random(2, 64), jnp.asarray(0.6))


@pytest.fixture(scope="module")
def values():
    """Something to replace outputs by, at every layer and step."""
    return tuple(jnp.asarray(random(seed, layers, STEPS, 32)) for seed, layers in ((3, 2), (4, 2), (5, 1)))


velocity = jax.jit(partial(ablated_velocity, grid=GRID))
own = jax.jit(partial(model_velocity, grid=GRID))


def edited(model, site, bias=None):
    """The model with one MLP that gives nothing, or one vector at every row."""
    group, layer = site
    changed = jax.tree.map(jnp.asarray, model)
    if group == JOINT:
        out = changed.single.mlp_out
        # Attention shares this bias, and the MLP's own output has none.
        out.bias[...] = out.bias[...].at[layer].add(0 if bias is None else bias)
    else:
        out = (changed.double.img, changed.double.txt)[group].mlp.down
        out.bias[...] = out.bias[...].at[layer].set(0 if bias is None else bias)
    out.kernel[...] = out.kernel[...].at[layer].set(0)
    return changed


def test_every_mlp_is_a_site_in_the_order_of_the_forward_pass(organism):
    assert sites(organism.config.transformer) == SITES
    config = transformer_config(FlowRecipe(depth_double=3, depth_single=4))
    assert len(sites(config)) == len(set(sites(config))) == 2 * 3 + 4


def test_ablating_nothing_is_the_models_own_velocity(organism, inputs, values):
    nothing = ablation(organism.config.transformer, None, values)
    ours = velocity((organism.transformer, nothing), inputs, jnp.asarray(1))
    assert relative_error(ours, own(organism.transformer, inputs, jnp.asarray(1))) <= TOL.f32_block


@pytest.mark.parametrize("site", SITES)
def test_zeroing_a_site_is_zeroing_the_output_weights_of_its_mlp(organism, inputs, values, site):
    zero = ablation(organism.config.transformer, site, jax.tree.map(jnp.zeros_like, values))
    ours = velocity((organism.transformer, zero), inputs, jnp.asarray(1))
    assert relative_error(ours, own(edited(organism.transformer, site), inputs, jnp.asarray(1))) <= TOL.f32_block
    # It matters: every MLP of random weights does.
    assert relative_error(ours, own(organism.transformer, inputs, jnp.asarray(1))) > 100 * TOL.f32_block


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("site", SITES)
def test_replacing_a_site_is_giving_its_mlp_a_constant_output_that_the_step_chooses(
    organism, inputs, values, site, step
):
    replaced = ablation(organism.config.transformer, site, values)
    ours = velocity((organism.transformer, replaced), inputs, jnp.asarray(step))
    constant = edited(organism.transformer, site, values[site[0]][site[1], step])
    assert relative_error(ours, own(constant, inputs, jnp.asarray(step))) <= TOL.f32_block


def test_mean_outputs_are_those_of_a_slow_loop(organism):
    model, run = organism.transformer, plan_run(organism.config, steps=STEPS)
    noise, text, pooled = random(6, 2, 36, 32), random(7, 2, 20, 96), random(8, 2, 64)
    embed = jax.jit(partial(type(model).embed, grid=GRID))
    apply = jax.jit(lambda block, h, cond: block(h, cond))
    final = jax.jit(lambda model, img, cond: model.final(img, cond))
    found = {site: np.zeros((STEPS, 2, 32)) for site in SITES}
    for image in range(2):
        latents = jnp.asarray(noise[image])
        for step in range(STEPS):
            h, cond = embed(model, Inputs(latents, text[image], pooled[image], jnp.asarray(run.sigmas[step])))
            for layer in range(2):
                h, acts = apply(slice_layer(model.double, layer), h, cond)
                for group in (IMG, TXT):
                    found[group, layer][step, image] = np.mean(acts.mlp_out[group], axis=0)
            joint, acts = apply(slice_layer(model.single, 0), sequences(h, model.single.groups), cond)
            found[JOINT, 0][step, image] = np.mean(acts.mlp_out[0], axis=0)
            img = streams(joint, model.single.groups, h).img
            latents = latents + (run.sigmas[step + 1] - run.sigmas[step]) * final(model, img, cond)
    means = mean_outputs(model, run, jnp.asarray(text), jnp.asarray(pooled), jnp.asarray(noise))
    for group, layer in SITES:
        assert relative_error(means[group][layer], found[group, layer].mean(axis=1)) <= TOL.f32_run, (group, layer)
