"""A circuit as arrays, and its file.

Nodes come in the order: the graph's own targets; the other features; errors; inputs; outputs; rest. Within a kind they
are sorted by step, block, stream, position and feature. An edge has attribution(source -> target), in units of the
target's pre-activation; edges are sorted by target, then source.

A graph explains one target or several, weighted. They are its first nodes and the first entries of `target_node`;
`provenance.target_weights` lists their weights, positive numbers, one each.

1. `Graph` checks itself when it is made: lengths, types, its targets, and that every index points somewhere.
2. `save` writes one `.npz` without pickled objects, whole or not at all; `load` refuses what is damaged.

Every expanded target carries its pre-activation u, its bias, and the sum and absolute sum of all its edges before any
threshold, so that sum + bias = u can be checked however much of the graph has been dropped. By how much they miss, over
the absolute sum of edges and bias, is the target's conservation error; `conservation_error` is its one definition.
"""

import json
import zipfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.circuits.provenance import Provenance
from difffract_jax.config import UserError
from difffract_jax.files import atomic_file

FORMAT_VERSION = 1
FEATURE, ERROR, INPUT, OUTPUT, REST = range(5)
KINDS = ("feature", "error", "input", "output", "rest")
IMG, TXT, LATENT = range(3)
STREAMS = ("img", "txt", "latent")


@dataclass(frozen=True, eq=False)
class Graph:
    """A circuit. All arrays have one axis; their types are those of the file, which `_DTYPES` lists.

    Attributes:
        node_kind: 0 feature, 1 error, 2 input, 3 output, 4 rest (unexpanded features of one site and position).
        node_step: denoising step, from 0.
        node_stream: 0 img, 1 txt, 2 latent.
        node_block: block; double-stream blocks first, then single-stream ones; -1 for inputs; the number of all blocks
            for outputs.
        node_position: position within the stream; -1 where positions are summed over.
        node_feature: feature; -1 for other kinds.
        node_value: a feature's value (the largest over positions where these are summed over); 1 for other kinds,
            whose vectors are taken whole.
        node_influence: influence on the graph's targets, from pruning; NaN before it.
        edge_source: node.
        edge_target: node; a feature or output.
        edge_attribution: value of the source times the derivative of the target's pre-activation by it.
        target_node: expanded nodes; the first are the graph's own targets.
        target_preactivation: u of each.
        target_bias: value of the affine map at zero sources.
        target_sum: sum of all edges into it, before any threshold.
        target_abs_sum: sum of their absolute values.
        map_indptr: start of each node's activation map; one longer than the nodes.
        map_position: positions of the maps.
        map_value: a feature's value there; for other kinds, once positions are summed over, the attribution from there.
        node_cumulative: share of all influence held by a node and those above it, from pruning; NaN before it.
        supernodes: name -> nodes grouped under it.
        provenance: where the graph comes from.
    """

    node_kind: np.ndarray
    node_step: np.ndarray
    node_stream: np.ndarray
    node_block: np.ndarray
    node_position: np.ndarray
    node_feature: np.ndarray
    node_value: np.ndarray
    node_influence: np.ndarray
    edge_source: np.ndarray
    edge_target: np.ndarray
    edge_attribution: np.ndarray
    target_node: np.ndarray
    target_preactivation: np.ndarray
    target_bias: np.ndarray
    target_sum: np.ndarray
    target_abs_sum: np.ndarray
    map_indptr: np.ndarray
    map_position: np.ndarray
    map_value: np.ndarray
    node_cumulative: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    supernodes: dict[str, list[int]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        if not self.node_cumulative.size:
            object.__setattr__(self, "node_cumulative", np.full(self.node_kind.size, np.nan, np.float32))
        problems = _problems(self)
        if problems:
            raise ValueError(f"These arrays are no graph: {'; '.join(problems)}.")

    @property
    def target(self) -> int:
        """The first of the nodes that the graph explains."""
        return int(self.target_node[0])

    @property
    def targets(self) -> Int64[np.ndarray, "root"]:
        """The nodes that the graph explains: its first ones."""
        return np.arange(len(self.provenance.target_weights))

    @property
    def root_weights(self) -> Float64[np.ndarray, "node"]:
        """The weight of every node in what the graph explains: 0 but at its targets, where they sum to 1."""
        weights = np.zeros(self.node_kind.size)
        weights[self.targets] = self.provenance.target_weights
        return weights / weights.sum()

    @property
    def by_position(self) -> bool:
        """Whether nodes stand for single positions, rather than sums over them."""
        return bool(np.any(self.node_position[self.node_kind == FEATURE] >= 0))

    @property
    def target_scale(self) -> Float64[np.ndarray, "target"]:
        """The size of what adds up to each expanded target: its absolute edges and its bias; 1 where both are 0."""
        return conservation_scale(self.target_abs_sum, self.target_bias)

    @property
    def conservation_error(self) -> Float64[np.ndarray, "target"]:
        """|sum of edges + bias - u| / (sum of |edges| + |bias|) of each expanded target; NaN where u is not known."""
        missed = np.abs(self.target_sum + self.target_bias - self.target_preactivation)
        return missed / self.target_scale

    @property
    def largest_conservation_error(self) -> float | None:
        """The largest conservation error; None for documents of other tools, which do not tell pre-activations."""
        worst = float(np.max(self.conservation_error))
        return None if np.isnan(worst) else worst

    def with_provenance(self, **facts: Any) -> "Graph":
        """Returns the graph with other facts of these names in its provenance.

        Args:
            facts: fields of `Provenance`, such as `pruning`.
        """
        return replace(self, provenance=replace(self.provenance, **facts))

    def save(self, path: str | Path) -> None:
        """Writes the graph to a `.npz` file.

        Args:
            path: file to write; it appears only when it is complete.
        """
        record = {"format_version": FORMAT_VERSION} | self.provenance.to_json()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _DTYPES}
        texts = {"supernodes": self.supernodes, "metadata": record}
        arrays |= {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in texts.items()}
        with atomic_file(Path(path)) as partial, partial.open("wb") as stream:
            np.savez_compressed(stream, **arrays)

    @staticmethod
    def load(path: str | Path) -> "Graph":
        """Reads a graph that `save` wrote.

        Args:
            path: the file.

        Raises:
            UserError: if it is no such file, is damaged, or is of another format version.
        """
        arrays = _read_arrays(Path(path))
        missing = [name for name in (*_DTYPES, "supernodes", "metadata") if name not in {*arrays, *_LATER}]
        if missing:
            raise UserError(f"{path} is no graph of difffract: it lacks {', '.join(missing)}; trace it again.")
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
            known = {name: arrays[name] for name in _DTYPES if name in arrays}
            return Graph(**known, supernodes=supernodes, provenance=provenance)
        except ValueError as error:
            raise UserError(f"{path} is damaged. {error} Trace it again.") from None


def conservation_scale(
    abs_sum: Float64[np.ndarray, "target"], bias: Float64[np.ndarray, "target"]
) -> Float64[np.ndarray, "target"]:
    """Returns what errors of targets are relative to: sums of absolute edges and of the bias; 1 where both are 0."""
    size = abs_sum + np.abs(bias)
    return np.where(size > 0, size, 1.0)


_DTYPES: dict[str, type] = {
    "node_kind": np.uint8,
    "node_step": np.int16,
    "node_stream": np.uint8,
    "node_block": np.int16,
    "node_position": np.int32,
    "node_feature": np.int32,
    "node_value": np.float32,
    "node_influence": np.float32,
    "edge_source": np.int32,
    "edge_target": np.int32,
    "edge_attribution": np.float32,
    "target_node": np.int32,
    "target_preactivation": np.float64,
    "target_bias": np.float64,
    "target_sum": np.float64,
    "target_abs_sum": np.float64,
    "map_indptr": np.int64,
    "map_position": np.int32,
    "map_value": np.float32,
    "node_cumulative": np.float32,
}
_LATER = ("node_cumulative",)
"""What files of earlier releases lack; then as if the graph were not pruned."""
assert [f.name for f in fields(Graph)] == [*_DTYPES, "supernodes", "provenance"]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream:
        try:
            loaded = np.load(stream, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else None
        except (zipfile.BadZipFile, EOFError, ValueError, KeyError):
            raise UserError(f"{path} is no readable .npz file; give a file that `difffract trace` wrote.") from None
    if arrays is None:
        raise UserError(f"{path} is a single array, no graph; give a file that `difffract trace` wrote.")
    return arrays


def _problems(graph: Graph) -> list[str]:
    """Names everything that keeps the arrays from being a graph."""
    arrays = {name: getattr(graph, name) for name in _DTYPES}
    wrong = [
        f"{name} is {array.dtype} with {array.ndim} axes instead of {np.dtype(_DTYPES[name])} with 1"
        for name, array in arrays.items()
        if array.dtype != _DTYPES[name] or array.ndim != 1
    ]
    if wrong:
        return wrong
    nodes = graph.node_kind.size
    lengths = {"node": nodes, "edge": graph.edge_source.size, "target": graph.target_node.size}
    lengths["map"] = graph.map_position.size
    wrong = [
        f"{name} has {array.size} entries instead of {lengths[name.split('_')[0]]}"
        for name, array in arrays.items()
        if name != "map_indptr" and array.size != lengths[name.split("_")[0]]
    ]
    if graph.map_indptr.size != nodes + 1:
        wrong.append(f"map_indptr has {graph.map_indptr.size} entries instead of {nodes + 1}")
    elif graph.map_indptr[0] != 0 or graph.map_indptr[-1] != lengths["map"] or np.any(np.diff(graph.map_indptr) < 0):
        wrong.append("map_indptr does not divide the maps")
    for name in ("edge_source", "edge_target", "target_node"):
        array = arrays[name]
        if array.size and not 0 <= array.min() <= array.max() < nodes:
            wrong.append(f"{name} points outside the {nodes} nodes")
    wrong += _wrong_targets(graph)
    if np.any(graph.node_kind >= len(KINDS)) or np.any(graph.node_stream >= len(STREAMS)):
        wrong.append("a node has a kind or stream that does not exist")
    return wrong


def _wrong_targets(graph: Graph) -> list[str]:
    """Names what is wrong with the targets and their weights."""
    if not graph.target_node.size:
        return ["it has no target"]
    weights = graph.provenance.target_weights
    if not weights or not all(0 < weight < np.inf for weight in weights):
        return [f"its target_weights are {list(weights)} instead of a list of positive numbers"]
    if not np.array_equal(graph.target_node[: len(weights)], np.arange(len(weights))):
        return [f"its {len(weights)} targets are not its first nodes and the first of target_node"]
    return []


def keep(graph: Graph, nodes: np.ndarray, edges: np.ndarray) -> Graph:
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
    arrays = {name: getattr(graph, name) for name in _DTYPES}
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
