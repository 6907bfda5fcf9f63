"""Circuits of the shape that the pages show: an image grid, words, blocks of two stacks, maps, several steps."""

from dataclasses import replace

import numpy as np

from difffract_jax.address import flux_layout
from difffract_jax.graphs.graph import FEATURE, Graph
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


def large(nodes: int, edges: int, seed: int = 0, blocks: int = 20) -> Graph:
    """A circuit of a given size, summed over positions, as a big model would have."""
    rng = np.random.default_rng(seed)
    tokens = ("▁a", "▁red", "▁circle", "▁left", "▁of", "▁a", "▁blue", "▁square", "</s>")
    block = np.sort(rng.integers(0, blocks, nodes - 1))
    stream = (rng.random(nodes - 1) < 0.3).astype(np.uint8)
    feature = np.arange(nodes - 1)
    kind = np.zeros(nodes, np.uint8)
    kind[0] = 3
    block = np.concatenate([[blocks], block])
    source = rng.integers(1, nodes, 3 * edges)
    target = rng.integers(0, nodes, 3 * edges)
    pairs = np.unique(np.stack([target, source])[:, block[source] < block[target]], axis=1)
    pairs = pairs[:, np.sort(rng.permutation(pairs.shape[1])[:edges])]
    value = (rng.standard_normal(pairs.shape[1]) * rng.random(pairs.shape[1]) ** 3).astype(np.float32)
    expanded = np.union1d([0], pairs[0])
    sums, sizes = (np.bincount(pairs[0], v.astype(np.float64), nodes)[expanded] for v in (value, np.abs(value)))
    bias = rng.standard_normal(expanded.size)
    positions = np.where(np.concatenate([[0], stream])[:, None], rng.integers(0, 9, (nodes, 6)), 0)
    positions = np.where(
        np.concatenate([[0], stream])[:, None], positions, rng.integers(0, 256, (nodes, 1)) + np.arange(6)
    )
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
        node_kind=kind,
        node_step=np.zeros(nodes, np.int16),
        node_stream=np.concatenate([[0], stream]).astype(np.uint8),
        node_block=block.astype(np.int16),
        node_position=np.full(nodes, -1, np.int32),
        node_feature=np.concatenate([[-1], feature]).astype(np.int32),
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
        map_position=np.sort(positions[1:], axis=1).ravel().astype(np.int32) % 256,
        map_value=rng.uniform(0.1, 2, 6 * (nodes - 1)).astype(np.float32),
        provenance=Provenance(shared=run, transcoders="t", steps=(0,)),
    )


def features_of(graph: Graph) -> np.ndarray:
    """Returns the feature nodes."""
    return np.flatnonzero(graph.node_kind == FEATURE)
