"""Graphs that commands read: what could not be taken as it stood in a file is told on stderr."""

import sys
from pathlib import Path

from difffract_jax.graphs.files.reader import is_archive, read_graph
from difffract_jax.graphs.graph import Graph


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
