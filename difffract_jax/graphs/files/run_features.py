"""What a graph tells of its features, as examples for the viewers: where each is active in the graph's own run.

A feature of the text has its words, the padding behind them left out. The viewers show no images, but a feature of the
image can be read as well: each row of patches is an example, a square per patch, one below the other, which the viewers
colour by its value. In a large image a square stands for the strongest of several patches.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from difffract_jax.address import BRANCHES, PROMPT, TXT
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.feature_files import FeatureExample, FeatureRecord
from difffract_jax.graphs.files.viewer_nodes import WORD_BEGIN, dictionary_number, short
from difffract_jax.graphs.graph import FEATURE, Graph

PATCH = "\u25a0 "
"""A square."""
PADDING = "<pad>"
MOST_SQUARES = 24
"""Along a side of an image."""


def run_features(graph: Graph) -> list[FeatureRecord]:
    """Returns where the features of a graph are active.

    Args:
        graph: any graph; one without maps, or without words and a grid, gives nothing.

    Returns:
        A record for every feature of which there is something to show, once, whatever its steps.
    """
    summed = aggregate(graph)
    several, branches = np.unique(summed.node_step).size > 1, bool(summed.node_branch.any())
    found: dict[tuple[int, int], dict[str, Sequence[FeatureExample]]] = {}
    for node in np.flatnonzero(summed.node_kind == FEATURE).tolist():
        examples = list(_examples(summed, node))
        if examples:
            block, stream = int(summed.node_block[node]), int(summed.node_stream[node])
            place = dictionary_number(block, stream), int(summed.node_feature[node])
            step = f", step {summed.node_step[node]}" if several else ""
            step += f", {BRANCHES[summed.node_branch[node]]} branch" if branches else ""
            found.setdefault(place, {})[f"In this run{step}"] = examples
    return [FeatureRecord(*place, examples) for place, examples in found.items()]


def _examples(graph: Graph, node: int) -> Iterator[FeatureExample]:
    """Yields the words, or rows of patches, at which a feature is active or not."""
    run = graph.provenance.known
    start, end = (int(place) for place in graph.map_indptr[node : node + 2])
    if start == end:
        return
    positions, values = graph.map_position[start:end], graph.map_value[start:end]
    if graph.node_stream[node] == TXT:
        tokens = run.tokens if graph.node_branch[node] == PROMPT else run.negative_tokens
        words = [token.replace(WORD_BEGIN, " ") for token in tokens or ()]
        if positions.max() < len(words):
            last = max(place for place, word in enumerate(words) if word != PADDING or place == positions.max())
            values = _laid_out(positions, values, len(words))[: last + 1]
            yield FeatureExample(words[: last + 1], [*map(short, values)], int(np.abs(values).argmax()))
    elif run.grid is not None and positions.max() < run.grid[0] * run.grid[1]:
        for row in _pooled(_laid_out(positions, values, run.grid[0] * run.grid[1]).reshape(run.grid)):
            yield FeatureExample([PATCH] * row.size, [*map(short, row)], None)


def _laid_out(positions: np.ndarray, values: np.ndarray, count: int) -> Float32[np.ndarray, "position"]:
    """Returns a map as one value per position."""
    placed = np.zeros(count, np.float32)
    placed[positions] = values
    return placed


def _pooled(values: Float32[np.ndarray, "row column"]) -> Float32[np.ndarray, "square_row square_column"]:
    """Returns the strongest value of each square of patches, so that at most `MOST_SQUARES` stand along a side."""
    wide = -(-max(values.shape) // MOST_SQUARES)
    rows, columns = (-(-side // wide) for side in values.shape)
    padded = np.zeros((rows * wide, columns * wide), np.float32)
    padded[: values.shape[0], : values.shape[1]] = values
    squares = padded.reshape(rows, wide, columns, wide).swapaxes(1, 2).reshape(rows, columns, -1)
    strongest = np.abs(squares).argmax(axis=2)
    return np.take_along_axis(squares, strongest[..., None], axis=2)[..., 0]
