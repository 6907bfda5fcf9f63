"""The arrays of a circuit, checked; `graph` adds its file and what one wants to see of it.

Nodes come in the order: the graph's own targets; the other features; errors; inputs; outputs; rest; scores;
modulations; words. Within a kind they are sorted by step, block, stream, position and feature. An edge has
attribution(source -> target), in units of the target's pre-activation; edges are sorted by target, then source.

A graph explains one target or several, weighted. They are its first nodes and the first entries of `target_node`;
`provenance.target_weights` lists their weights, positive numbers, one each.

Every expanded target carries its pre-activation u, its bias, and the sum and absolute sum of all its edges before any
threshold, so that sum + bias = u can be checked however much of the graph has been dropped. By how much they miss, over
the absolute sum of edges and bias, is the target's conservation error; `conservation_error` is its one definition.
"""

from dataclasses import dataclass, field, fields

import numpy as np
from jaxtyping import Float64, Int64

from difffract_jax.address import BRANCHES, STREAMS
from difffract_jax.graphs.provenance import Provenance

FEATURE, ERROR, INPUT, OUTPUT, REST, SCORE, MODULATION, WORD = range(8)
KINDS = ("feature", "error", "input", "output", "rest", "score", "modulation", "word")
EXPLAINING = (SCORE, MODULATION, WORD)
"""Kinds that say more of what the frozen map holds: attention, and the pooled path. They are no sources of that map."""


@dataclass(frozen=True, eq=False)
class GraphArrays:
    """A circuit. All arrays have one axis; their types are those of the file, which `DTYPES` lists.

    Attributes:
        node_kind: 0 feature, 1 error, 2 input, 3 output, 4 rest (unexpanded features of one site and position), 5 score
            (of attention: a block's head, query and key; or, without a head, all of a block's other scores), 6
            modulation (a block's shift, scale or gate), 7 word (token of the prompt, as CLIP reads it).
        node_step: denoising step, from 0.
        node_stream: 0 img, 1 txt, 2 latent; of a score, its query's.
        node_block: block, numbered through the model; -1 for inputs and words; the number of all blocks for outputs and
            for modulations of the last norm.
        node_position: position within the stream, of a score its query's; -1 where positions are summed over.
        node_feature: feature; of a modulation its row among those of its block and stream; of a word its place in
            CLIP's sequence; -1 for other kinds.
        node_value: a feature's value, or a score minus its query's pattern-weighted mean (the largest over positions
            where these are summed over); of a modulation the norm of what it has beyond the empty prompt's; 1 for other
            kinds, whose vectors are taken whole.
        node_influence: influence on the graph's targets, from pruning; NaN before it.
        edge_source: node.
        edge_target: node; a feature, a score, a modulation or an output.
        edge_attribution: value of the source times the derivative of the target's pre-activation by it; of an edge into
            a score, the part of its value that the source makes; of an edge from a modulation, what it brings to the
            exchange of the pooled embedding, and of one into it the part of that which the word makes.
        target_node: expanded nodes; the first are the graph's own targets.
        target_preactivation: u of each.
        target_bias: value of the affine map at zero sources.
        target_sum: sum of all edges into it, before any threshold.
        target_abs_sum: sum of their absolute values.
        map_indptr: start of each node's activation map; one longer than the nodes.
        map_position: positions of the maps.
        map_value: a feature's value there; for other kinds, once positions are summed over, the attribution from there.
        node_cumulative: share of all influence held by a node and those above it, from pruning; NaN before it.
        node_branch: branch of guidance, 0 prompt or 1 negative; 0 too of latents and outputs, which are of both, and
            where a step is one evaluation.
        node_head: head of a score; -1 for other kinds, and for the rest of a block's scores.
        node_key_stream: stream of a score's key; 0 for other kinds.
        node_key_position: position of a score's key; -1 for other kinds, and where positions are summed over.
        edge_query: of an edge into a score, the part that goes through its query; 0 for other edges.
        edge_remainder: of an edge from a score, by how much more the target falls when the score is taken away and the
            softmax of its block is live; of one from a modulation, the same when it alone becomes what the empty prompt
            gives, in the live model; 0 for other edges.
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
    node_branch: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    node_head: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    node_key_stream: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    node_key_position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    edge_query: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    edge_remainder: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    supernodes: dict[str, list[int]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        for name, value in ABSENT.items():
            like = self.node_kind if name.startswith("node") else self.edge_source
            array = getattr(self, name)
            # What says nothing fits any number of nodes and edges, as after `dataclasses.replace`.
            empty = not array.size or (name in SILENT and not np.any(array != value))
            if empty and array.size != like.size:
                object.__setattr__(self, name, np.full(like.size, value, DTYPES[name]))
        problems = _problems(self)
        if problems:
            raise ValueError(f"These arrays are not a graph: {'; '.join(problems)}.")

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


def conservation_scale(
    abs_sum: Float64[np.ndarray, "target"], bias: Float64[np.ndarray, "target"]
) -> Float64[np.ndarray, "target"]:
    """Returns what errors of targets are relative to: sums of absolute edges and of the bias; 1 where both are 0."""
    size = abs_sum + np.abs(bias)
    return np.where(size > 0, size, 1.0)


DTYPES: dict[str, type] = {
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
    "node_branch": np.uint8,
    "node_head": np.int16,
    "node_key_stream": np.uint8,
    "node_key_position": np.int32,
    "edge_query": np.float32,
    "edge_remainder": np.float32,
}
"""Type of every array, in the file as in memory."""
OF_SCORES: dict[str, float] = {
    "node_head": -1,
    "node_key_stream": 0,
    "node_key_position": -1,
    "edge_query": 0,
    "edge_remainder": 0,
}
"""Arrays that a file of a graph without scores lacks, and what fills them."""
SILENT = {"node_branch": 0} | OF_SCORES
"""Arrays that a file lacks where they say nothing: of a graph in one branch, or without scores."""
ABSENT = {"node_cumulative": float("nan")} | SILENT
"""Arrays that may be left out, and what fills them."""
assert [f.name for f in fields(GraphArrays)] == [*DTYPES, "supernodes", "provenance"]


def _problems(graph: GraphArrays) -> list[str]:
    """Names everything that keeps the arrays from being a graph."""
    arrays = {name: getattr(graph, name) for name in DTYPES}
    wrong = [
        f"{name} is {array.dtype} with {array.ndim} axes instead of {np.dtype(DTYPES[name])} with 1"
        for name, array in arrays.items()
        if array.dtype != DTYPES[name] or array.ndim != 1
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
    streams = np.concatenate([graph.node_stream, graph.node_key_stream])
    known = np.all(graph.node_kind < len(KINDS)) and np.all(graph.node_branch < len(BRANCHES))
    if not known or np.any(streams >= len(STREAMS)):
        wrong.append("a node has a kind, stream or branch that does not exist")
    return wrong


def _wrong_targets(graph: GraphArrays) -> list[str]:
    """Names what is wrong with the targets and their weights."""
    if not graph.target_node.size:
        return ["it has no target"]
    weights = graph.provenance.target_weights
    if not weights or not all(0 < weight < np.inf for weight in weights):
        return [f"its target_weights are {list(weights)} instead of a list of positive numbers"]
    if not np.array_equal(graph.target_node[: len(weights)], np.arange(len(weights))):
        return [f"its {len(weights)} targets are not its first nodes and the first of target_node"]
    return []
