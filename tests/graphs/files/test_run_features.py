"""Examples of features that a graph itself tells: words, and rows of patches."""

from dataclasses import replace

import numpy as np

from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.run_features import PATCH, run_features
from difffract_jax.graphs.files.viewer_nodes import dictionary_number
from difffract_jax.graphs.graph import FEATURE
from shown_circuits import TOKENS, circuit


def test_every_feature_s_map_is_in_its_examples():
    graph = aggregate(circuit(steps=2))
    records = {(one.dictionary, one.feature): one for one in run_features(circuit(steps=2))}
    nodes = np.flatnonzero(graph.node_kind == FEATURE)
    assert nodes.size
    for node in nodes:
        stream, step = int(graph.node_stream[node]), int(graph.node_step[node])
        place = dictionary_number(int(graph.node_block[node]), stream), int(graph.node_feature[node])
        examples = records[place].examples[f"In this run, step {step}"]
        assert all(example.tokens[-1] != "<pad>" or example.activations[-1] for example in examples)
        found = np.zeros(6, np.float32)
        told = [value for example in examples for value in example.activations]
        found[: len(told)] = told
        part = slice(*graph.map_indptr[node : node + 2])
        expected = np.zeros(6, np.float32)
        expected[graph.map_position[part]] = graph.map_value[part]
        assert np.array_equal(found, expected)
        if stream == 0:
            assert len(examples) == 2 and examples[0].tokens == [PATCH, PATCH]
        else:
            words = [token.replace("\u2581", " ") for token in TOKENS]
            assert [*examples[0].tokens] == words[: len(told)] and len(told) >= 4
            assert examples[0].centre == int(found.argmax())


def test_a_graph_that_does_not_tell_words_or_grid_gives_nothing():
    assert run_features(circuit().with_provenance(shared=None)) == []


def test_a_large_image_has_squares_for_the_strongest_of_several_patches():
    graph = aggregate(circuit(steps=1))
    run = graph.provenance.shared
    large = graph.with_provenance(shared=replace(run, grid=(30, 50)))
    node = next(n for n in np.flatnonzero(graph.node_kind == FEATURE) if graph.node_stream[n] == 0)
    start, value = int(graph.map_indptr[node]), np.float32(7)
    positions, values = graph.map_position.copy(), graph.map_value.copy()
    positions[start], values[start] = 29 * 50 + 49, value
    block, feature = int(graph.node_block[node]), int(graph.node_feature[node])
    records = run_features(replace(large, map_position=positions, map_value=values))
    (mine,) = [one for one in records if (one.dictionary, one.feature) == (dictionary_number(block, 0), feature)]
    (examples,) = mine.examples.values()
    assert len(examples) == 10 and {len(example.tokens) for example in examples} == {17}
    assert examples[9].activations[16] == 7.0
