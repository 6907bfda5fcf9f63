"""Graphs that commands read: what could not be taken as it stood in a file is told on stderr."""

import sys
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.graphs.collection import read_collection
from difffract_jax.graphs.files.reader import is_archive, read_graph
from difffract_jax.graphs.graph import Graph
from difffract_jax.storage.remote.addresses import is_remote


def read(path: Path) -> Graph:
    """Reads a graph of any format, and warns of links of its document that were left out or are in doubt.

    Args:
        path: the file.

    Raises:
        UserError: if it is not a graph.
    """
    graph = read_graph(path)
    unclear = graph.provenance.unclear_links
    # A graph of ours that was made of such a document still says so; whoever made it was warned then.
    if unclear is not None and not is_archive(path):
        for sentence in unclear.sentences():
            sys.stderr.write(f"Warning: in {path}, {sentence}\n")
    return graph


def graphs_at(path: Path) -> list[Graph]:
    """Reads a graph, or all those of a collection, each with its file's name.

    Args:
        path: of a graph of any format, or of a directory that `trace --prompts` wrote.

    Raises:
        UserError: if it is neither, or the collection has no graph.
    """
    if not (path.is_dir() or (is_remote(path) and not path.suffix)):
        return [read(path).with_provenance(file=path.name)]
    collection = read_collection(path)
    graphs = [
        graph.with_provenance(file=run.graph)
        for run, graph in zip((run for run in collection.runs if run.graph), collection.graphs(), strict=True)
    ]
    if not graphs:
        raise UserError(f"{path} has no graph yet; go on with `difffract trace --prompts`.")
    return graphs
