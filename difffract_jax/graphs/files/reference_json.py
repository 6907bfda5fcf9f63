"""The reference's JSON, "version 2": a graph summed over positions, field for field.

1. Writing sums over positions first. Nodes are named `feature_L2_img_f326`, `error_L1_img`, `input_txt`.
2. The reference gives errors and unexpanded features (our kind rest) one name, `error_...`: their nodes are written as
   one, whose map is the sum of both, and their edges one after the other. Reading cannot tell them apart again.
3. Its counts are kept as they are: input edges are counted twice, as `input` and as `residual`.

Maps are rounded to 6 decimals and attributions to 8, as the reference does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from difffract_jax.address import LATENT, STREAMS
from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.checks import check_values
from difffract_jax.graphs.files.json_text import load_json
from difffract_jax.graphs.files.reference_fields import KIND_OF, VERSION, problem_of
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, MODULATION, REST, SCORE, WORD, Graph
from difffract_jax.graphs.provenance import Provenance
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

MAP_DECIMALS, ATTRIBUTION_DECIMALS = 6, 8
NAMES = {FEATURE: "feature", ERROR: "error", INPUT: "input", REST: "error"}


def write_reference_json(graph: Graph, path: str | Path) -> None:
    """Writes a graph as the reference's JSON.

    Args:
        graph: any graph; it is summed over positions first.
        path: file to write; it appears only when it is complete.
    """
    with atomic_file(Path(path)) as partial:
        partial.write_text(json.dumps(to_document(graph), indent=1) + "\n", encoding="utf-8")


def to_document(graph: Graph) -> dict[str, Any]:
    """Returns the JSON document of a graph.

    Args:
        graph: any graph; it is summed over positions first.

    Raises:
        UserError: if it has several targets or steps, a negative branch, or nodes that the format does not know.
    """
    several = np.unique(graph.node_step).size > 1 or graph.node_branch.any()
    if graph.targets.size > 1 or several or np.any(graph.node_stream == LATENT):
        raise UserError(
            "The reference's JSON holds one target at one step, in the prompt's branch alone, and no latents as "
            "inputs; export this graph in another format, or keep it as .npz."
        )
    position = int(graph.node_position[graph.target]) if graph.by_position else None
    graph = aggregate(graph)
    ids = [node_id(graph, node) for node in range(graph.node_kind.size)]
    nodes: dict[str, dict[str, Any]] = {}
    for node, name in enumerate(ids):
        nodes.setdefault(name, _node(graph, node, name))
        _add_map(nodes[name]["activation_map"], graph, node)
    for node in nodes.values():
        node["activation_map"] = {p: round(v, MAP_DECIMALS) for p, v in node["activation_map"].items()}
    edges = [
        {"src": ids[source], "tgt": ids[target], "attribution": round(float(value), ATTRIBUTION_DECIMALS)}
        for source, target, value in zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True)
    ]
    if position is None:
        map_of_target = nodes[ids[graph.target]]["activation_map"]
        position = int(next(iter(map_of_target), "-1"))
    return {
        "version": VERSION,
        "target": _target(graph, ids[graph.target], position),
        "config": _config(graph),
        "stats": _stats(graph, nodes),
        "nodes": list(nodes.values()),
        "edges": edges,
        "metadata": graph.provenance.to_json(),
    }


def node_id(graph: Graph, node: int) -> str:
    """Returns a node's name in the reference's JSON."""
    kind, stream = int(graph.node_kind[node]), STREAMS[graph.node_stream[node]]
    if kind == SCORE:
        raise UserError(
            "The reference's JSON has no attention scores as nodes; trace with attention frozen, or save this graph as "
            ".npz."
        )
    if kind in (MODULATION, WORD):
        raise UserError(
            "The reference's JSON has no modulations or words of the pooled path as nodes; trace with the pooled path "
            "frozen, or save this graph as .npz."
        )
    if kind not in NAMES:
        raise UserError("The reference's JSON has no output nodes; save this graph as .npz instead.")
    if kind == INPUT:
        return f"input_{stream}"
    name = f"{NAMES[kind]}_L{graph.node_block[node]}_{stream}"
    return f"{name}_f{graph.node_feature[node]}" if kind == FEATURE else name


def _node(graph: Graph, node: int, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": NAMES[int(graph.node_kind[node])],
        "layer": max(int(graph.node_block[node]), 0),
        "stream": STREAMS[graph.node_stream[node]],
        "feat_idx": int(graph.node_feature[node]),
        "activation_map": {},
    }


def _add_map(into: dict[str, float], graph: Graph, node: int) -> None:
    entries = slice(int(graph.map_indptr[node]), int(graph.map_indptr[node + 1]))
    for position, value in zip(graph.map_position[entries], graph.map_value[entries], strict=True):
        into[str(position)] = into.get(str(position), 0.0) + float(value)


def _target(graph: Graph, name: str, position: int) -> dict[str, Any]:
    node = graph.target
    return {
        "id": name,
        "layer": int(graph.node_block[node]),
        "stream": STREAMS[graph.node_stream[node]],
        "feat_idx": int(graph.node_feature[node]),
        "position": position,
        "preactivation": float(graph.target_preactivation[0]),
        "encoder_bias": float(graph.target_bias[0]),
    }


def _config(graph: Graph) -> dict[str, Any]:
    """Returns what the reference records of a run, from our provenance; a document that was read keeps its own."""
    if graph.provenance.reference_config is not None:
        return dict(graph.provenance.reference_config)
    run, settings = graph.provenance.known, graph.provenance.attribution
    step = int(graph.node_step[graph.target]) if run.step is None else run.step
    return {
        "prompt": run.prompt,
        "seed": run.seed,
        "step": step,
        "timestep": None if run.sigmas is None else run.sigmas[step],
        "circuit_max_nodes": settings and settings.max_nodes,
        "circuit_min_attribution": settings and settings.min_attribution,
        "model_id": run.model,
    }


def _stats(graph: Graph, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kinds = [node["type"] for node in nodes.values()]
    sources = [NAMES[int(kind)] for kind in graph.node_kind[graph.edge_source]]
    into_target = graph.edge_target == graph.target
    features = [node["stream"] for node in nodes.values()]
    return {
        "num_nodes": len(nodes),
        "num_edges": graph.edge_source.size,
        "num_feature_nodes": kinds.count("feature"),
        "num_error_nodes": kinds.count("error"),
        "num_residual_nodes": 0,
        "num_input_nodes": kinds.count("input"),
        "attribution_sum": float(np.sum(graph.edge_attribution[into_target], dtype=np.float64)),
        "nodes_by_stream": {stream: features.count(stream) for stream in ("img", "txt") if stream in features},
        "edges_by_type": {
            "feature": sources.count("feature"),
            "error": sources.count("error"),
            "residual": sources.count("input"),
            "input": sources.count("input"),
        },
    }


def read_reference_json(path: str | Path) -> Graph:
    """Reads a graph from the reference's JSON.

    Args:
        path: the file, of any encoding, gzipped or not.

    Returns:
        The graph, summed over positions. Totals are those of the target alone, and of the edges in the file.

    Raises:
        UserError: if it is not such a file, holds numbers that are not finite, or edges that run in a circle.
    """
    return graph_of_document(load_json(local_file(path)), str(path))


def graph_of_document(document: Any, source: str) -> Graph:
    """Returns the graph of a JSON value that should be a document; arguments and errors as `read_reference_json`.

    Args:
        document: a JSON value.
        source: what it was read from, for messages.
    """
    try:
        graph = from_document(document)
    except ValueError as error:
        raise UserError(f"{source} is not a version 2 graph of the reference: {error}") from None
    check_values(graph, source, [node["id"] for node in _target_first(document)])
    return graph


def _target_first(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the nodes with the target first, as in every graph of ours."""
    return sorted(document["nodes"], key=lambda node: node["id"] != document["target"]["id"])


def from_document(document: Any) -> Graph:
    """Returns the graph of a JSON document.

    Args:
        document: a JSON value, as the reference writes it.

    Raises:
        ValueError: naming the first thing in it that is missing, of another type, or not a finite number, or an edge
            that names a node that is not there.
    """
    problem = problem_of(document)
    if problem:
        raise ValueError(f"{problem}; export the graph again.")
    target, nodes = document["target"], _target_first(document)
    number = {node["id"]: i for i, node in enumerate(nodes)}
    kind = np.array([KIND_OF[node["type"]] for node in nodes], np.uint8)
    maps = [sorted((int(p), float(v)) for p, v in node["activation_map"].items()) for node in nodes]
    values = [max(v for _, v in m) if k == FEATURE and m else 1.0 for k, m in zip(kind, maps, strict=True)]
    ends = np.array([[number[edge["src"]], number[edge["tgt"]]] for edge in document["edges"]], np.int32)
    ends = ends.reshape(-1, 2)
    attribution = np.array([edge["attribution"] for edge in document["edges"]], np.float32)
    into_target = attribution[ends[:, 1] == 0].astype(np.float64)
    count = len(nodes)
    return Graph(
        node_kind=kind,
        node_step=np.full(count, document["config"]["step"], np.int16),
        node_stream=np.array([STREAMS.index(node["stream"]) for node in nodes], np.uint8),
        node_block=np.array([-1 if n["type"] == "input" else n["layer"] for n in nodes], np.int16),
        node_position=np.full(count, -1, np.int32),
        node_feature=np.array([node["feat_idx"] if node["type"] == "feature" else -1 for node in nodes], np.int32),
        node_value=np.array(values, np.float32),
        node_influence=np.full(count, np.nan, np.float32),
        edge_source=ends[:, 0].copy(),
        edge_target=ends[:, 1].copy(),
        edge_attribution=attribution,
        target_node=np.zeros(1, np.int32),
        target_preactivation=np.array([target["preactivation"]], np.float64),
        target_bias=np.array([target["encoder_bias"]], np.float64),
        target_sum=np.array([into_target.sum()]),
        target_abs_sum=np.array([np.abs(into_target).sum()]),
        map_indptr=np.concatenate([[0], np.cumsum([len(m) for m in maps])]).astype(np.int64),
        map_position=np.array([p for m in maps for p, _ in m], np.int32),
        map_value=np.array([v for m in maps for _, v in m], np.float32),
        provenance=Provenance.from_json({**document.get("metadata", {}), "reference_config": document["config"]}),
    )
