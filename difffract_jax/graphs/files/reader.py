"""Any graph file as a graph: its content shows of which format it is, never its name.

1. A zip archive is an `.npz` of ours (`graph.Graph.load`).
2. Anything else is JSON (`json_text`): nodes and links make a document of circuit-tracer or Neuronpedia
   (`viewer_document`), nodes and edges one of the reference (`reference_json`).
"""

from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.graphs.files.json_text import json_kind, load_json
from difffract_jax.graphs.files.reference_json import graph_of_document
from difffract_jax.graphs.files.viewer_document import checked_document
from difffract_jax.graphs.files.viewer_graph import graph_of
from difffract_jax.graphs.graph import Graph
from difffract_jax.storage.remote.cache import local_file

ARCHIVES = (b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY")
"""How files of NumPy begin: zip archives, empty ones, single arrays."""
SHOWN_KEYS = 6


def is_archive(path: str | Path) -> bool:
    """Says whether a file begins like one of NumPy's, and so holds a graph of ours if it holds any."""
    with local_file(path).open("rb") as stream:
        return stream.read(6).startswith(ARCHIVES)


def read_graph(path: str | Path) -> Graph:
    """Reads a graph of any format that is understood.

    Args:
        path: here or in a bucket: a `.npz` file of ours, the reference's JSON, or that of circuit-tracer and
            Neuronpedia; told apart by content.

    Returns:
        The graph. Links of a document to nodes that it does not have are left out; `provenance.unclear_links` says how
        many.

    Raises:
        UserError: if it is none of them, holds numbers that are not finite, or edges that run in a circle.
    """
    path = local_file(path)
    if not path.is_file():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {problem}; give a graph file, .npz or JSON.")
    if is_archive(path):
        return Graph.load(path)
    document = load_json(path)
    if isinstance(document, dict) and "nodes" in document:
        if "links" in document:
            return graph_of(checked_document(document, str(path)), str(path))
        if "edges" in document:
            return graph_of_document(document, str(path))
    raise UserError(
        f"{path} is not a graph file: it is JSON, {_content(document)}; a graph has nodes and links (circuit-tracer, "
        "Neuronpedia) or nodes and edges (the reference)."
    )


def _content(document: Any) -> str:
    """Says what a JSON value is that is not a graph."""
    if not isinstance(document, dict):
        return json_kind(document)
    names = [str(name)[:30] for name in document]
    rest = ", ..." if len(names) > SHOWN_KEYS else ""
    return f"an object with {', '.join(names[:SHOWN_KEYS])}{rest}" if names else "an object without any entry"
