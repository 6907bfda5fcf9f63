"""Random circuits for tests of host-side code."""

import numpy as np

from difffract_jax.circuits import expansion
from difffract_jax.circuits.expansion import SourceTable


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
    return SourceTable(*(np.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)), step=steps)


def random_edges(rng, table):
    """Dense attributions [target, source] of every row to every row, zero where no edge can be."""
    block = table.block.astype(int)
    values = rng.standard_normal((block.size, block.size)) * rng.random((block.size, block.size)) ** 2
    values *= block[None, :] < block[:, None]
    values *= np.where(table.kind == 0, table.value > 0, True)[None, :]
    return values.astype(np.float32)


def expand(table, edges, target, *, max_nodes, batch, smallest, bias=0.25):
    """Runs an expansion as `attribute` does, with made-up edges."""
    state = expansion.start(table, np.array([target]), np.ones(1), smallest)
    rows = np.array([target])
    while rows.size:
        sums = edges[rows].sum(axis=1, dtype=np.float64)
        state = expansion.add(state, rows, edges[rows], sums + bias, np.full(rows.size, bias))
        rows = expansion.next_batch(state, min(batch, max_nodes - state.expanded.size))
    return state


def random_graph(seed, *, layers=3, max_nodes=12, smallest=0.05):
    """A compacted random circuit."""
    rng = np.random.default_rng(seed)
    table = random_table(rng, layers=layers)
    top = np.flatnonzero((table.kind == 0) & (table.block == layers - 1) & (table.value > smallest))
    edges = random_edges(rng, table)
    return expansion.compact(expand(table, edges, int(top[0]), max_nodes=max_nodes, batch=4, smallest=smallest))
