"""The image of a run in a viewer's document: `metadata.image_input`, written and read (docs/viewers.md).

    image_base64      the image, as a `data:` address or base64 alone
    image_token_id    the token that stands for a patch in the prompt; -1, since these models have none
    image_positions   the column of every patch, row by row; -1 for one that no node stands at
    grid_rows, grid_cols   of patches

That is how an integration of vision models into Neuronpedia keeps it, the one convention for images in such graphs that
is published. Summed over positions a graph has one column for the image, so that the grid has one patch, all of it.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from difffract_jax.address import IMG
from difffract_jax.config import UserError
from difffract_jax.graphs.graph import OUTPUT, Graph

FIELD = "image_input"


def image_input(graph: Graph, column: Int64[np.ndarray, "node"], address: str) -> dict[str, Any]:
    """Returns what a document's metadata say of the image.

    Args:
        graph: as it is shown, summed over positions or not. Of several steps, patches stand for the last one,
            of both branches of guidance for the prompt's where it has a node.
        column: of every node.
        address: `data:` address of the image.

    Raises:
        UserError: if it shows single positions and does not tell their grid.
    """
    grid = graph.provenance.known.grid if graph.by_position else (1, 1)
    if grid is None:
        raise UserError(
            "The graph does not tell its grid of image tokens, so that an image has no place beside single positions; "
            "leave --by-position or --image out."
        )
    positions = np.full(grid[0] * grid[1], -1, np.int64)
    placed = graph.node_position >= 0 if graph.by_position else True  # the rest of a block's attention scores is not
    patches = np.flatnonzero((graph.node_stream == IMG) & (graph.node_kind != OUTPUT) & placed)
    patches = patches[graph.node_step[patches] == graph.node_step[patches].max(initial=-1)]
    patches = patches[np.argsort(-graph.node_branch[patches].astype(int), kind="stable")]  # the later one stays
    place = np.maximum(graph.node_position[patches], 0)
    inside = place < positions.size
    positions[place[inside]] = column[patches[inside]]
    return {
        "image_base64": address,
        "image_token_id": -1,
        "image_positions": positions.tolist(),
        "grid_rows": int(grid[0]),
        "grid_cols": int(grid[1]),
    }


def image_bytes(metadata: Mapping[str, Any] | None) -> bytes | None:
    """Returns the image file that a document's metadata hold; None if they hold none.

    Args:
        metadata: of a document; None for a graph that comes from none.

    Raises:
        UserError: if what they hold is not base64.
    """
    told = (metadata or {}).get(FIELD)
    text = told.get("image_base64") if isinstance(told, dict) else None
    if not isinstance(text, str):
        return None
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise UserError(
            "The document's image is not base64, so it cannot be shown; give one with --image FILE."
        ) from None
