"""Random circuits for tests of host-side code."""

from dataclasses import replace

import numpy as np

from difffract_jax.circuits.attribution import expansion
from difffract_jax.circuits.attribution.expansion import SourceTable
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, REST, SCORE, Graph
from difffract_jax.graphs.provenance import Provenance


def random_table(rng, *, layers=3, rows=4, active=3, features=6, step=1):
    """A source table in the layout of a trace: two streams, `active` distinct features per position, errors, inputs."""
    parts = []
    for block in range(layers):
        for stream in (0, 1):
            for position in range(rows):
                values = rng.uniform(0, 3, active) * (rng.random(active) < 0.9)
                for feature, value in zip(rng.permutation(features)[:active], values, strict=True):
                    parts.append((0, stream, block, position, feature, value))
        parts += [(1, stream, block, position, -1, 1) for stream in (0, 1) for position in range(rows)]
    parts += [(2, stream, -1, position, -1, 1) for stream in (0, 1) for position in range(rows)]
    dtypes = (np.uint8, np.uint8, np.int16, np.int32, np.int32, np.float32)
    columns = zip(*parts, strict=True)
    steps = np.full(len(parts), step, np.int16)
    return SourceTable(
        *(np.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)),
        step=steps,
        branch=np.zeros(len(parts), np.uint8),
    )


def random_edges(rng, table):
    """Dense attributions [target, source] of every row to every row, zero where no edge can be."""
    block = table.block.astype(int)
    values = rng.standard_normal((block.size, block.size)) * rng.random((block.size, block.size)) ** 2
    values *= block[None, :] < block[:, None]
    values *= np.where(table.kind == 0, table.value > 0, True)[None, :]
    return values.astype(np.float32)


def expand(table, edges, target, *, max_nodes, batch, smallest, bias=0.25):
    """Runs an expansion as `attribute` does, with made-up edges."""
    state = expansion.start_expansion(table, np.array([target]), np.ones(1), smallest)
    rows = np.array([target])
    while rows.size:
        sums = edges[rows].sum(axis=1, dtype=np.float64)
        state = expansion.add(state, rows, [edges[rows]], sums + bias, np.full(rows.size, bias))
        rows = expansion.next_batch(state, min(batch, max_nodes - state.expanded.size))
    return state


def random_graph(seed, *, layers=3, max_nodes=12, smallest=0.05):
    """A compacted random circuit."""
    rng = np.random.default_rng(seed)
    table = random_table(rng, layers=layers)
    top = np.flatnonzero((table.kind == 0) & (table.block == layers - 1) & (table.value > smallest))
    edges = random_edges(rng, table)
    return expansion.compact(expand(table, edges, int(top[0]), max_nodes=max_nodes, batch=4, smallest=smallest))


def with_score(graph, value=-2.5):
    """Returns a graph with an unexpanded node made an attention score, head 1 of its block, with an edge into it.

    Returns:
        The graph, and the score's node.
    """
    node = int(np.flatnonzero(graph.node_kind == REST)[-1])
    score = np.arange(graph.node_kind.size) == node
    source = np.append(graph.edge_source, np.flatnonzero(graph.node_kind == INPUT)[0]).astype(np.int32)
    target = np.append(graph.edge_target, node).astype(np.int32)
    order = np.lexsort((source, target))
    edges = {"edge_source": source, "edge_target": target}
    edges["edge_attribution"] = np.append(graph.edge_attribution, 0.75).astype(np.float32)
    edges["edge_query"] = np.append(np.zeros(graph.edge_source.size), 0.5).astype(np.float32)
    edges["edge_remainder"] = np.where(source == node, 0.25, 0.0).astype(np.float32)
    made = replace(
        graph,
        node_kind=np.where(score, SCORE, graph.node_kind).astype(np.uint8),
        node_value=np.where(score, value, graph.node_value).astype(np.float32),
        node_head=np.where(score, 1, -1).astype(np.int16),
        node_key_stream=np.where(score, 1, 0).astype(np.uint8),
        node_key_position=np.where(score, 2, -1).astype(np.int32),
        **{name: array[order] for name, array in edges.items()},
    )
    return made, node


def random_output_graph(seed, *, weights=(2.0, 1.0, 0.5), steps=2, blocks=4, rows=3, features=3):
    """A random circuit with several weighted targets: two outputs and a feature of the last step, over several steps.

    Blocks 2 and 3 are single-stream ones, inputs of the initial noise are of stream 2, and some nodes dangle.
    """
    rng = np.random.default_rng(seed)
    last = steps - 1
    targets = [
        (OUTPUT, last, 0, blocks, -1, -1),
        (OUTPUT, last, 0, blocks, -1, -1),
        (FEATURE, last, 0, blocks - 1, 0, 0),
    ]
    sites = [
        (step, stream, block, row)
        for step in range(steps)
        for block in range(blocks)
        for stream in (0, 1)
        for row in range(rows)
    ]
    nodes = {(FEATURE, *site, int(rng.integers(features))) for site in sites if rng.random() < 0.7} - {*targets}
    nodes |= {(kind, *site, -1) for site in sites for kind in (ERROR, REST) if rng.random() < 0.4}
    nodes |= {(INPUT, 0, stream, -1, row, -1) for stream in (1, 2) for row in range(rows)}
    nodes = targets[: len(weights)] + sorted(nodes)
    kind, step, stream, block, position, feature = (np.array(column) for column in zip(*nodes, strict=True))
    order = step * (blocks + 2) + block
    can = (order[:, None] < order[None, :]) & np.isin(kind, (FEATURE, OUTPUT))[None, :] & (kind != OUTPUT)[:, None]
    target, source = np.nonzero((can & (rng.random(can.shape) < 0.15)).T)
    values = rng.standard_normal(source.size).astype(np.float32)
    expanded = np.flatnonzero(np.isin(kind, (FEATURE, OUTPUT)))
    expanded = np.concatenate([expanded[expanded < len(weights)], expanded[expanded >= len(weights)]])
    sums, abs_sums = (np.bincount(target, v, kind.size)[expanded] for v in (values, np.abs(values)))
    bias = rng.standard_normal(expanded.size)
    maps = (kind == FEATURE).astype(np.int64)
    value = np.where(kind == FEATURE, rng.uniform(0.1, 3, kind.size), 1).astype(np.float32)
    return Graph(
        *(
            array.astype(dtype)
            for array, dtype in zip((kind, step, stream, block, position, feature), _NODE, strict=True)
        ),
        node_value=value,
        node_influence=np.full(kind.size, np.nan, np.float32),
        edge_source=source.astype(np.int32),
        edge_target=target.astype(np.int32),
        edge_attribution=values,
        target_node=expanded.astype(np.int32),
        target_preactivation=sums + bias,
        target_bias=bias,
        target_sum=sums,
        target_abs_sum=abs_sums,
        map_indptr=np.concatenate([[0], np.cumsum(maps)]),
        map_position=position[maps > 0].astype(np.int32),
        map_value=value[maps > 0],
        provenance=Provenance(target_weights=tuple(weights)),
    )


_NODE = (np.uint8, np.int16, np.uint8, np.int16, np.int32, np.int32)
