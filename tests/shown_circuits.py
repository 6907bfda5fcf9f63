"""Circuits of the shape that the pages show: an image grid, words, blocks of two stacks, maps, several steps."""

from dataclasses import replace

import numpy as np

from difffract_jax.address import NEGATIVE, PROMPT, flux_layout
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, REST, Graph
from difffract_jax.graphs.provenance import AttributionSettings, KnownRun, PooledPath, Provenance
from random_graphs import random_output_graph

TOKENS = ("▁a", "▁red", "▁circle", "</s>", "<pad>", "<pad>")


def circuit(seed: int = 0, *, steps: int = 2, prompt: str = "a red circle", model: str = "m") -> Graph:
    """A circuit of one target, with a grid of 2 x 2 image tokens and six text tokens."""
    graph = random_output_graph(seed, weights=(1.0,), steps=steps, rows=4, features=5)
    run = KnownRun(
        prompt=prompt, seed=seed, grid=(2, 2), text_tokens=6, tokens=TOKENS, layout=flux_layout(2, 2), model=model
    )
    settings = AttributionSettings(target="velocity:norm", max_nodes=9, expansion_batch=1, min_attribution=1e-6)
    value = float(graph.target_preactivation[0])
    pooled = PooledPath(value=value, without=value / 2, share=0.5)
    told = Provenance(
        shared=run, attribution=settings, transcoders="t", steps=tuple(range(steps)), pooled_path=(pooled,)
    )
    return replace(graph, provenance=told)


def guided_circuit(seed: int = 0) -> Graph:
    """A circuit of a run with two branches, summed over positions; every other feature is of the negative prompt."""
    graph = aggregate(circuit(seed))
    run = replace(
        graph.provenance.known, guidance=4.0, negative_prompt="a blue one", negative_tokens=("▁a", "▁blue", *TOKENS[2:])
    )
    odd = np.arange(graph.node_kind.size) % 2 == 1
    negative = np.where((graph.node_kind == FEATURE) & odd, NEGATIVE, PROMPT).astype(np.uint8)
    return replace(graph, node_branch=negative).with_provenance(shared=run)


def large(nodes: int, edges: int, seed: int = 0, blocks: int = 20) -> Graph:
    """A circuit of a given size, summed over positions, as a big model would have."""
    rng = np.random.default_rng(seed)
    tokens = ("▁a", "▁red", "▁circle", "▁left", "▁of", "▁a", "▁blue", "▁square", "</s>")
    inputs = nodes // 20
    block = np.concatenate([[blocks], np.full(inputs, -1), np.sort(rng.integers(0, blocks, nodes - 1 - inputs))])
    stream = np.concatenate([[0], rng.random(nodes - 1) < 0.3]).astype(np.uint8)
    kind = rng.choice([FEATURE, ERROR, REST], nodes, p=[0.8, 0.12, 0.08])
    kind[: 1 + inputs] = [OUTPUT] + [INPUT] * inputs
    feature = np.arange(nodes)  # of errors and inputs too, which makes every node one of its own
    source, target = rng.integers(1, nodes, 6 * edges), rng.integers(0, nodes, 6 * edges)
    target[: 2 * edges // 50] = 0
    can = (block[source] < block[target]) & np.isin(kind[target], (FEATURE, OUTPUT))
    pairs = np.unique(np.stack([target, source])[:, can], axis=1)
    pairs = pairs[:, np.sort(rng.permutation(pairs.shape[1])[:edges])]
    value = (rng.standard_normal(pairs.shape[1]) * rng.random(pairs.shape[1]) ** 3).astype(np.float32)
    expanded = np.union1d([0], pairs[0])
    sums, sizes = (np.bincount(pairs[0], v.astype(np.float64), nodes)[expanded] for v in (value, np.abs(value)))
    bias = rng.standard_normal(expanded.size)
    starts = np.where(stream[1:], rng.integers(0, 4, nodes - 1), rng.integers(0, 250, nodes - 1))
    positions = starts[:, None] + np.arange(6)
    run = KnownRun(
        prompt="a red circle left of a blue square",
        seed=seed,
        grid=(16, 16),
        text_tokens=9,
        tokens=tokens,
        layout=flux_layout(blocks // 2, blocks - blocks // 2),
        model="m",
    )
    return Graph(
        node_kind=kind.astype(np.uint8),
        node_step=np.zeros(nodes, np.int16),
        node_stream=stream,
        node_block=block.astype(np.int16),
        node_position=np.full(nodes, -1, np.int32),
        node_feature=feature.astype(np.int32),
        node_value=np.concatenate([[1], rng.uniform(0.1, 3, nodes - 1)]).astype(np.float32),
        node_influence=np.full(nodes, np.nan, np.float32),
        edge_source=pairs[1].astype(np.int32),
        edge_target=pairs[0].astype(np.int32),
        edge_attribution=value,
        target_node=expanded.astype(np.int32),
        target_preactivation=sums + bias,
        target_bias=bias,
        target_sum=sums,
        target_abs_sum=sizes,
        map_indptr=np.concatenate([[0, 0], 6 * np.arange(1, nodes)]).astype(np.int64),
        map_position=positions.ravel().astype(np.int32),
        map_value=rng.uniform(0.1, 2, 6 * (nodes - 1)).astype(np.float32),
        provenance=Provenance(shared=run, transcoders="t", steps=(0,)),
    )
