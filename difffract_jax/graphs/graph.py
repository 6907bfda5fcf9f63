"""A circuit: its arrays (`arrays`), its file, and what one wants to see of it.

1. A graph checks itself when it is made: lengths, types, its targets, and that every index points somewhere.
2. `save` writes one `.npz` without pickled objects, whole or not at all; `load` refuses what is damaged.
3. `summary`, `top` and `to_networkx` show it; so does the graph itself, in a few lines; `show` makes its page.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.display import page_of
from difffract_jax.graphs import summary as showing
from difffract_jax.graphs.arrays import (
    ABSENT,
    DTYPES,
    ERROR,
    EXPLAINING,
    FEATURE,
    INPUT,
    KINDS,
    MODULATION,
    OF_SCORES,
    OUTPUT,
    REST,
    SCORE,
    WORD,
    GraphArrays,
    conservation_scale,
)
from difffract_jax.graphs.checks import check_values
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

__all__ = [
    "ERROR",
    "EXPLAINING",
    "FEATURE",
    "FORMAT_VERSION",
    "Graph",
    "INPUT",
    "KINDS",
    "MODULATION",
    "OUTPUT",
    "REST",
    "SCORE",
    "WORD",
    "conservation_scale",
    "subgraph",
]
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Graph(GraphArrays):
    """A circuit: nodes, edges, and where they come from; `GraphArrays` lists its arrays."""

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def summary(self) -> showing.GraphSummary:
        """Returns what one wants to know of the graph first: nodes by kind, edges, steps, targets, pruning, run."""
        return showing.summarise(self)

    def top(self, n: int = 10) -> showing.TopNodes:
        """Returns the most influential nodes, the targets left out.

        Args:
            n: how many at most.

        Returns:
            A table; influence is that of pruning, or where there was none computed over all edges.
        """
        return showing.top_nodes(self, n)

    def show(self, pipe: Any = None, **options: Any) -> Any:
        """Returns the graph's page, that of `difffract view`: a notebook shows it, and `save` writes it to a file.

        Groups, names and notes made in the page are its `groups`, while the notebook's kernel runs.

        Args:
            pipe: the pipeline of the run, which makes the image beside the graph.
            options: further arguments of `dashboards.notebook.show_graph`: `image`, `labels`, `groups`, `compare`,
                `by_position`, `limits`, `height`.

        Raises:
            UserError: as `dashboards.notebook.show_graph`.
        """
        return page_of("graph", self, pipe, **options)

    def to_networkx(self) -> Any:
        """Returns a `networkx.DiGraph`; nodes and edges carry their columns as attributes, nodes their names as keys.

        Raises:
            UserError: if networkx is not installed.
        """
        return showing.to_networkx(self)

    def with_provenance(self, **facts: Any) -> "Graph":
        """Returns the graph with other facts of these names in its provenance.

        Args:
            facts: fields of `Provenance`, such as `pruning`.
        """
        return replace(self, provenance=replace(self.provenance, **facts))

    def save(self, path: str | Path) -> None:
        """Writes the graph to a `.npz` file.

        Args:
            path: file to write, here or in a bucket; it appears only when it is complete.
        """
        record = {"format_version": FORMAT_VERSION} | self.provenance.to_json()
        without = set() if np.any(np.isin(self.node_kind, EXPLAINING)) else {*OF_SCORES}
        without |= set() if self.node_branch.any() else {"node_branch"}
        arrays: dict[str, Any] = {name: getattr(self, name) for name in DTYPES if name not in without}
        texts = {"supernodes": self.supernodes, "metadata": record}
        arrays |= {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in texts.items()}
        with atomic_file(Path(path)) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @staticmethod
    def load(path: str | Path) -> "Graph":
        """Reads a graph that `save` wrote.

        Args:
            path: the file, here or in a bucket as gs://BUCKET/KEY or s3://BUCKET/KEY.

        Raises:
            UserError: if it is not such a file, is damaged, is of another format version, or holds numbers that are
                not finite.
        """
        arrays = _read_arrays(local_file(path))
        missing = [name for name in (*DTYPES, "supernodes", "metadata") if name not in {*arrays, *ABSENT}]
        if missing:
            raise UserError(f"{path} is not a graph of difffract: it lacks {', '.join(missing)}; trace it again.")
        try:
            supernodes, metadata = (json.loads(arrays[name].tobytes()) for name in ("supernodes", "metadata"))
        except ValueError as error:
            raise UserError(f"{path} is damaged: its metadata are not JSON ({error}); trace it again.") from None
        if not isinstance(metadata, dict):
            raise UserError(f"{path} is damaged: its metadata are not named values; trace it again.")
        version = metadata.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has graph format {version}, but this release reads {FORMAT_VERSION}; trace it again."
            )
        provenance = Provenance.from_json(metadata, str(path))
        try:
            known = {name: arrays[name] for name in DTYPES if name in arrays}
            graph = Graph(**known, supernodes=supernodes, provenance=provenance)
        except ValueError as error:
            raise UserError(f"{path} is damaged. {error} Trace it again.") from None
        check_values(graph, str(path))
        return graph


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream:
        try:
            loaded = np.load(stream, allow_pickle=False)
            archive = loaded if isinstance(loaded, np.lib.npyio.NpzFile) else None
            ours = archive is not None and bool({*DTYPES} & {*archive.files})
            arrays = dict(archive) if archive is not None and ours else {}
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError):
            raise UserError(f"{path} is not a readable .npz file; give a file that `difffract trace` wrote.") from None
    if archive is None:
        raise UserError(f"{path} is a single array, not a graph; give a file that `difffract trace` wrote.")
    if not ours:
        raise UserError(f"{path} is not a graph: it is {_other_archive(archive.files)}")
    return arrays


def _other_archive(names: list[str]) -> str:
    """Says what a zip archive is that holds none of a graph's arrays, and what to give instead."""
    if any(name.endswith("data.pkl") for name in names):
        return "a file of PyTorch; export that graph as JSON for circuit-tracer's viewer, and give the JSON."
    held = f"an archive of {', '.join(names[:4])}" if names else "an empty archive"
    return f"{held}; give a file that `difffract trace` wrote."


def subgraph(graph: Graph, nodes: np.ndarray, edges: np.ndarray) -> Graph:
    """Returns the graph of some of its nodes and edges.

    Args:
        graph: the graph.
        nodes: mask of the nodes to keep; the targets are kept in any case.
        edges: mask of the edges to keep; those that lose an end are dropped.
    """
    nodes = nodes.copy()
    nodes[graph.targets] = True
    edges = edges & nodes[graph.edge_source] & nodes[graph.edge_target]
    number = np.cumsum(nodes, dtype=np.int32) - 1
    number = number.astype(np.int32)
    targets = nodes[graph.target_node]
    lengths = np.diff(graph.map_indptr)
    entries = np.repeat(nodes, lengths)
    arrays = {name: getattr(graph, name) for name in DTYPES}
    for name, array in arrays.items():
        group = name.split("_")[0]
        if group != "map":
            arrays[name] = array[{"node": nodes, "edge": edges, "target": targets}[group]]
    for name in ("edge_source", "edge_target", "target_node"):
        arrays[name] = number[arrays[name]]
    arrays["map_indptr"] = np.concatenate([[0], np.cumsum(lengths[nodes])]).astype(np.int64)
    arrays["map_position"], arrays["map_value"] = graph.map_position[entries], graph.map_value[entries]
    kept = {name: [int(number[n]) for n in group if nodes[n]] for name, group in graph.supernodes.items()}
    return replace(graph, **arrays, supernodes={name: group for name, group in kept.items() if group})
