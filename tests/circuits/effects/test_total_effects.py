"""Total effects are what interventions do: without a source, the propagated reading moves by its effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.effects.effect_tables import strongest
from difffract_jax.circuits.effects.readings import scaled
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.frozen.replacement import prepare_steps
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.loading import load_pipeline, load_transcoders, save_pipeline, save_transcoders
from difffract_jax.models.blocks import Streams
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.transcoders.transcoder import random_transcoders
from tolerances import TOL, relative_error
from traces import guided_pipeline, make_transcoders


def made(pipe, **guidance):
    """Transcoders, a span of two steps, and an output."""
    tcs = make_transcoders(pipe.config.transformer, seed=4, img=(0, 2), txt=(1,), joint=(1,), skip=True, features=16)
    run = pipe.plan(height=16, width=16, text_tokens=4, steps=4, **guidance)
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=run)
    return tcs, span, resolve_target(pipe, span, parse_target("pixels:color=red,box=0,0,8,8"))


def put(per_group, group, new):
    """The tuple with one group's entry replaced."""
    return tuple(new if i == group else one for i, one in enumerate(per_group))


ENTERING = jax.jit(lambda weights, latents, text: Streams(weights.img_in(latents), weights.txt_in(text)))


def value(steps, span, output, factors, noise, texts):
    """The output's value, step after step through the propagated reading, with its inputs scaled."""
    weights, sigmas, branches = steps[0].record.weights, span.info.sigmas, span.info.branches
    scale = span.info.guidance if branches > 1 else 1.0
    entering = z = np.asarray(steps[0].record.latents) * noise[:, None]
    for number, (one, trace, factor) in enumerate(zip(steps, span.traces, factors, strict=True)):
        branch = number % branches
        if not branch:
            entering, velocity = z, np.zeros_like(z)
        boundary = ENTERING(weights, entering, np.asarray(one.record.text) * texts[branch][:, None])
        own = scaled(one._replace(sources=one.sources._replace(boundary=boundary)), factor, "propagated").velocity
        velocity = velocity + (1 - scale if branch else scale) * np.asarray(own)
        z = entering + (sigmas[trace.info.step + 1] - sigmas[trace.info.step]) * velocity
    return float(np.sum(output.velocity * velocity) + np.sum(output.latents * entering))


@pytest.mark.parametrize("branches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_a_source_the_output_moves_by_its_effect(x64, branches):
    pipe, guidance = random_pipeline(seed=4, dtype=jnp.float64), {}
    if branches == 2:
        pipe, guidance = guided_pipeline(jnp.float64), {"guidance": 2.5, "negative_prompt": "a blur"}
    tcs, span, output = made(pipe, **guidance)
    found, steps = total_effects(span, tcs, output), prepare_steps(span.traces, tcs)
    sizes = [0 if stack is None else 16 for stack in tcs.per_group(span.info.layout)]
    one = tuple(np.ones((e.shape[0], size)) for e, size in zip(steps[0].sources.errors, sizes, strict=True))
    assert len(steps) == 2 * branches == 2 * found.branches
    all_on = [one] * len(steps)
    noise, text = np.ones(found.noise.shape[0]), [np.ones(found.text.shape[0])] * branches
    base = value(steps, span, output, all_on, noise, text)
    moved, expected = [], []
    for step in range(len(steps)):
        for group in range(3):
            for layer in range(one[group].shape[0]):
                # Features of one sublayer do not act on one another: at all positions at once, effects add up.
                total = np.zeros(16)
                np.add.at(total, np.asarray(found.index[group][step, layer]), found.features[group][step, layer])
                if np.any(total):
                    off = one[group].copy()
                    off[layer, np.abs(total).argmax()] = 0
                    changed = [put(one, group, off) if i == step else one for i in range(len(steps))]
                    moved.append(value(steps, span, output, changed, noise, text) - base)
                    expected.append(-total[np.abs(total).argmax()])
                sources = steps[step].sources
                errors = np.array(sources.errors[group])
                errors[layer, 1] = 0
                sources = sources._replace(errors=put(sources.errors, group, jax.device_put(errors)))
                cut = [s._replace(sources=sources) if i == step else s for i, s in enumerate(steps)]
                moved.append(value(cut, span, output, all_on, noise, text) - base)
                expected.append(-float(found.errors[group][step, layer, 1]))
    for row in range(3):
        off = np.where(np.arange(noise.size) == row, 0.0, 1.0)
        moved.append(value(steps, span, output, all_on, off, text) - base)
        expected.append(-float(found.noise[row]))
        for branch, effects in enumerate((found.text, found.negative_text)[:branches]):
            cut_off = [off[:4] if i == branch else on for i, on in enumerate(text)]
            moved.append(value(steps, span, output, all_on, noise, cut_off) - base)
            expected.append(-float(effects[row]))
    size = np.abs(expected).max()
    assert np.count_nonzero(expected) >= 20
    assert np.abs(np.subtract(moved, expected)).max() <= TOL.intervention_x64 * max(size, abs(base))
    with pytest.raises(ValueError, match="lies in step 1, but effects are on the last step, 2"):
        total_effects(span, tcs, output._replace(step=1))


@pytest.mark.slow
def test_streamed_weights_give_the_effects_of_both_branches(tmp_path):
    pipe = guided_pipeline()
    save_pipeline(pipe, tmp_path / "model")
    sites = {"img": (0, 2), "txt": (1,), "joint": (1,)}
    save_transcoders(random_transcoders(pipe.config.transformer, features=16, sites=sites), tmp_path / "transcoders")
    found = []
    for weights in ("device", "disk"):
        pipe, tcs = (
            load(tmp_path / name, weights=weights)
            for load, name in ((load_pipeline, "model"), (load_transcoders, "transcoders"))
        )
        run = pipe.plan(height=16, width=16, text_tokens=4, steps=4, guidance=2.5, negative_prompt="a blur")
        span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=run)
        output = resolve_target(pipe, span, parse_target("pixels:color=red,box=0,0,8,8"))
        found.append(total_effects(span, tcs, output))
    theirs, ours = found
    # Of streamed transcoders there are places for the active features alone, so that features are compared by number.
    every = np.ones(ours.noise.shape[0], bool), np.ones((2, ours.text.shape[0]), bool)
    ranked = [{str(one.feature): one.effect for one in strongest(one, tcs, *every, 60)} for one in found]
    largest = max(map(abs, ranked[0].values()))
    shared = ranked[0].keys() & ranked[1].keys()
    assert len(shared) > 50 and {name.rpartition("~")[2] for name in shared} == {"prompt", "negative"}
    assert all(abs(ranked[0][name] - ranked[1][name]) <= 1e-5 * largest for name in shared)
    for name in ("text", "negative_text", "noise"):
        assert relative_error(getattr(ours, name), getattr(theirs, name)) <= 1e-5
    for one, other in zip(ours.errors, theirs.errors, strict=True):
        assert np.max(np.abs(np.asarray(one) - np.asarray(other)), initial=0) <= 1e-5 * largest
