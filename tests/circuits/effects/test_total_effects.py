"""Total effects are what interventions do: without a source, the propagated reading moves by its effect."""

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution.outputs import parse_target, resolve_target
from difffract_jax.circuits.effects.readings import scaled
from difffract_jax.circuits.effects.total_effects import total_effects
from difffract_jax.circuits.frozen.replacement import prepare_steps
from difffract_jax.circuits.trace.capture import capture_steps
from difffract_jax.models.blocks import Streams
from difffract_jax.models.tiny import random_pipeline
from tolerances import TOL
from traces import make_transcoders


@pytest.fixture
def made(x64):
    pipe = random_pipeline(seed=4, dtype=jnp.float64)
    tcs = make_transcoders(pipe.config.transformer, seed=4, img=(0, 2), txt=(1,), joint=(1,), skip=True, features=16)
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, run=pipe.plan(height=16, width=16, text_tokens=4))
    return tcs, span, resolve_target(pipe, span, parse_target("pixels:color=red,box=0,0,8,8"))


def put(per_group, group, new):
    """The tuple with one group's entry replaced."""
    return tuple(new if i == group else one for i, one in enumerate(per_group))


def value(steps, span, output, factors, noise, text):
    """The output's value, step after step through the propagated reading, with its inputs scaled."""
    weights, sigmas = steps[0].record.weights, span.info.sigmas
    z = steps[0].record.latents * noise[:, None]
    for one, trace, factor in zip(steps, span.traces, factors, strict=True):
        boundary = Streams(weights.img_in(z), weights.txt_in(one.record.text * text[:, None]))
        entering = z
        velocity = scaled(one._replace(sources=one.sources._replace(boundary=boundary)), factor, "propagated").velocity
        z = z + (sigmas[trace.info.step + 1] - sigmas[trace.info.step]) * velocity
    return float(jnp.sum(output.velocity * velocity) + jnp.sum(output.latents * entering))


def test_without_a_source_the_output_moves_by_its_effect(made):
    tcs, span, output = made
    found, steps = total_effects(span, tcs, output), prepare_steps(span.traces, tcs)
    sizes = [0 if stack is None else 16 for stack in tcs.per_group(span.info.layout)]
    one = tuple(np.ones((e.shape[0], size)) for e, size in zip(steps[0].sources.errors, sizes, strict=True))
    all_on = [one, one]
    noise, text = np.ones(found.noise.shape[0]), np.ones(found.text.shape[0])
    base = value(steps, span, output, all_on, noise, text)
    moved, expected = [], []
    for step in range(2):
        for group in range(3):
            for layer in range(one[group].shape[0]):
                # Features of one sublayer do not act on one another: at all positions at once, effects add up.
                total = np.zeros(16)
                np.add.at(total, np.asarray(found.index[group][step, layer]), found.features[group][step, layer])
                if np.any(total):
                    off = one[group].copy()
                    off[layer, np.abs(total).argmax()] = 0
                    changed = [put(one, group, off) if i == step else one for i in range(2)]
                    moved.append(value(steps, span, output, changed, noise, text) - base)
                    expected.append(-total[np.abs(total).argmax()])
                errors = steps[step].sources.errors[group].at[layer, 1].set(0)
                sources = steps[step].sources
                sources = sources._replace(errors=put(sources.errors, group, errors))
                cut = [s._replace(sources=sources) if i == step else s for i, s in enumerate(steps)]
                moved.append(value(cut, span, output, all_on, noise, text) - base)
                expected.append(-float(found.errors[group][step, layer, 1]))
    for row in range(3):
        off = np.where(np.arange(noise.size) == row, 0.0, 1.0)
        moved.append(value(steps, span, output, all_on, off, text) - base)
        expected.append(-float(found.noise[row]))
        moved.append(value(steps, span, output, all_on, noise, off[: text.size]) - base)
        expected.append(-float(found.text[row]))
    size = np.abs(expected).max()
    assert np.count_nonzero(expected) >= 20
    assert np.abs(np.subtract(moved, expected)).max() <= TOL.intervention_x64 * max(size, abs(base))
    with pytest.raises(ValueError, match="lies in step 1, but effects are on the last step, 2"):
        total_effects(span, tcs, output._replace(step=1))
