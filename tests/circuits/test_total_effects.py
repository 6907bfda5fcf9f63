"""Total effects are those of a graph in which everything is expanded, over steps and through every kind of site."""

import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.circuits.attribution import attribute
from difffract_jax.circuits.graph import ERROR, FEATURE, IMG, INPUT, TXT
from difffract_jax.circuits.outputs import parse_target, resolve
from difffract_jax.circuits.readings import effects
from difffract_jax.circuits.total_effects import total_effects
from difffract_jax.circuits.trace import capture_steps
from difffract_jax.models.tiny import random_pipeline
from tolerances import relative_error
from traces import make_transcoders

FLOAT32_GRAPH = 1e-5
"""A graph keeps edges and values in float32, and paths of either sign cancel."""


def test_total_effects_are_those_of_a_whole_graph(x64):
    pipe = random_pipeline(seed=4, dtype=jnp.float64)
    tcs = make_transcoders(pipe.config.transformer, seed=4, img=(0, 2), txt=(1,), joint=(1,), skip=True)
    span = capture_steps(pipe, tcs, "a red circle", first=1, last=2, height=24, width=24, text_tokens=6)
    output = resolve(pipe, span, parse_target("pixels:color=red,box=0,0,12,12"))
    graph = attribute(span, tcs, target=output, max_nodes=10_000, expansion_batch=500, min_attribution=0.0)
    found, expected = total_effects(span, tcs, output), effects(graph)
    depth, text = span.info.depths[0], span.info.text_tokens
    numbers = [[], []]
    for node in np.flatnonzero(np.isin(graph.node_kind, (FEATURE, ERROR, INPUT))):
        columns = (graph.node_kind, graph.node_step, graph.node_stream, graph.node_block, graph.node_position)
        kind, step, stream, block, position = (int(column[node]) for column in columns)
        if kind == INPUT:
            value = (found.text if stream == TXT else found.noise)[position]
        else:
            group = 2 if block >= depth else stream
            row = position + text * (group == 2 and stream == IMG)
            at = step - 1, block - depth * (group == 2), row
            value = found.errors[group][at]
            if kind == FEATURE:
                mine = found.index[group][at] == int(graph.node_feature[node])
                value = jnp.sum(jnp.where(mine, found.features[group][at], 0))
        numbers[0].append(float(value))
        numbers[1].append(expected[node])
    assert len(numbers[0]) > 500
    assert relative_error(*numbers) <= FLOAT32_GRAPH


def test_only_outputs_of_the_last_step_have_total_effects():
    pipe = random_pipeline(seed=4)
    tcs = make_transcoders(pipe.config.transformer, seed=4, dtype=jnp.float32)
    span = capture_steps(pipe, tcs, "a red circle", first=0, last=1, height=24, width=24, text_tokens=6)
    output = resolve(pipe, span, parse_target("pixels:color=red"), step=0)
    with pytest.raises(ValueError, match="lies in step 0, but effects are on the last step, 1"):
        total_effects(span, tcs, output)
