"""What the viewer's page holds of a graph: one block of bytes, columns of numbers behind a JSON header (NumPy).

    bytes 0-3        length of the header, little-endian
    then             the header, UTF-8 JSON; `arrays` lists name, type, offset from the end of the header, and length
    then             the arrays, each at a multiple of 8 bytes

The page computes influence and pruning itself, from the same numbers in the same order as `pruning`, so that what it
shows is what `difffract prune` would keep.
"""

import base64
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.address import NEGATIVE, STREAMS, TXT
from difffract_jax.config import UserError
from difffract_jax.dashboards.target_words import target_title
from difffract_jax.display import hash_text
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.arrays import DTYPES, SILENT
from difffract_jax.graphs.graph import FEATURE, INPUT, KINDS, MODULATION, OUTPUT, WORD, Graph
from difffract_jax.graphs.groups import identity
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.loras import texts_of
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.order import node_levels
from difffract_jax.graphs.provenance import KnownRun
from difffract_jax.graphs.pruning import prune
from difffract_jax.text_files import unicode_replaced

SMALL = 60
"""Nodes up to which a graph that was not pruned is shown whole at first."""
STARTING = (0.8, 0.98)
"""Thresholds of nodes and edges that a larger one is shown at first, those of `difffract prune`."""
MORE, ENOUGH = (0.9, 0.95, 0.98), 10
"""Thresholds of nodes that are taken instead, in turn, until so many features are seen: inputs may hold nearly all."""
LADDER = ((0.99, 0.999), (0.95, 0.99), (0.9, 0.98), (0.8, 0.98), (0.7, 0.95), (0.5, 0.9), (0.3, 0.8), (0.1, 0.5))
"""Thresholds that are tried in turn until a graph that is too large fits."""
MOST_TOKENS = 2048
"""Tokens of another tool's document up to which each gets a column."""
_UNUSED = ("node_influence", "node_cumulative", *SILENT)
"""Columns that the page computes itself, or does not show but by the names of nodes."""
_ARRAYS = {name: kind for name, kind in DTYPES.items() if name not in _UNUSED} | {"map_indptr": np.int32}
"""Columns of a graph that a page holds; JavaScript has no plain integers of 64 bits."""


class Limits(NamedTuple):
    """The largest graph that a page may hold.

    Attributes:
        nodes: most nodes.
        edges: most edges.
    """

    nodes: int = 10_000
    edges: int = 100_000


def shown_graph(graph: Graph, *, by_position: bool = False, limits: Limits | None = None, name: str = "") -> Graph:
    """Returns the graph that a page shows: summed over positions, unless asked not to.

    Args:
        graph: any graph.
        by_position: show single positions.
        limits: what a page may hold.
        name: of its file, for the message, which then names commands; "" for a graph in Python.

    Raises:
        UserError: if the graph is too large, with the pruning that would make it fit.
    """
    limits = limits or Limits()
    shown = graph if by_position else summed_where_possible(graph)
    if _fits(shown, limits):
        return shown
    positions = by_position or shown.by_position  # which pruning would sum over, unless told not to
    flag = " --by-position" if positions else ""
    for nodes, edges in LADDER:
        if _fits(prune(shown, node_threshold=nodes, edge_threshold=edges, by_position=True), limits):
            how = f"node_threshold={nodes}, edge_threshold={edges}{', by_position=True' if positions else ''}"
            command = f"difffract prune {shlex.quote(name)} --node-threshold {nodes} --edge-threshold {edges}{flag}"
            command = f"`{command} --out pruned.npz`, and view pruned.npz"
            first = command if name else f"`prune(graph, {how})`, and show that"
            raise UserError(f"{_too_large(shown, limits, name or 'The graph')}; prune it first: {first}.")
    limit = "--max-nodes and --max-links" if name else "`limits`"
    raise UserError(f"{_too_large(shown, limits, name or 'The graph')}, even when pruned; raise {limit}.")


def check_difference(graph: Graph, limits: Limits, limit: str = "--max-nodes and --max-links") -> None:
    """Refuses a difference of two graphs that is larger than a page may hold, as it has the nodes of both.

    Args:
        graph: the difference.
        limits: what a page may hold.
        limit: what raises them, for the message.

    Raises:
        UserError: if it is too large.
    """
    if not _fits(graph, limits):
        raise UserError(
            f"{_too_large(graph, limits, 'The difference of the two graphs')}; prune both first, or raise {limit}."
        )


def _too_large(graph: Graph, limits: Limits, name: str) -> str:
    has = f"has {graph.node_kind.size:,} nodes and {graph.edge_source.size:,} edges"
    return f"{name} {has}, more than the {limits.nodes:,} and {limits.edges:,} that a page stays quick with"


def summed_where_possible(graph: Graph) -> Graph:
    """Returns a graph summed over positions, or as it is where its sum would run in circles.

    That is so in documents of other tools with edges between positions of one layer.

    Args:
        graph: any graph.
    """
    summed = aggregate(graph)
    return summed if leads_forward(summed) else graph


def leads_forward(graph: Graph) -> bool:
    """Says whether a graph has no cycle, without which nothing can be computed of it.

    Args:
        graph: any graph.
    """
    try:
        node_levels(graph)
    except UserError:
        return False
    return True


def _fits(graph: Graph, limits: Limits) -> bool:
    return graph.node_kind.size <= limits.nodes and graph.edge_source.size <= limits.edges


def graph_bytes(
    graph: Graph, labels: Mapping[str, str] | None = None, *, title: str = "", tokens: Sequence[str] | None = None
) -> bytes:
    """Returns a graph as the page reads it; see the module.

    Args:
        graph: from `shown_graph`.
        labels: what features stand for, by their names as `feature_names` gives them.
        title: what to call the graph; what it explains if left out.
        tokens: of the text, where the graph does not tell them.
    """
    header = _header(graph, labels or {}, title) | ({} if tokens is None else {"tokens": list(tokens)})
    arrays = {name: getattr(graph, name).astype(kind) for name, kind in _ARRAYS.items()}
    if graph.node_branch.any():  # else a step is one evaluation, and the page says nothing of branches
        arrays["node_branch"] = graph.node_branch
    arrays |= {"node_level": node_levels(graph).astype(np.int32), "node_root": graph.root_weights.astype(np.float64)}
    body, table = bytearray(), []
    for name, array in arrays.items():
        body += b"\0" * (-len(body) % 8)
        table.append({"name": name, "type": array.dtype.name, "offset": len(body), "length": array.size})
        body += np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    text = json.dumps(header | {"arrays": table}).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return len(text).to_bytes(4, "little") + text + bytes(body)


def packed(data: bytes) -> str:
    """Returns bytes as text that no HTML can be mistaken in: deflated, in base64."""
    maker = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b64encode(maker.compress(data) + maker.flush()).decode()


def _header(graph: Graph, labels: Mapping[str, str], title: str) -> dict[str, Any]:
    provenance, names, features = graph.provenance, node_names(graph), feature_names(graph)
    run, groups = provenance.known, identity(graph)
    return {
        "title": title or names[graph.target],
        "names": names,
        "features": features,
        "labels": [labels.get(feature, "") if feature else "" for feature in features],
        "kinds": KINDS,
        "streams": STREAMS,
        "blocks": _block_names(graph),
        "steps": sorted({*np.unique(graph.node_step).tolist(), *provenance.steps}),
        "by_position": graph.by_position,
        "tokens": _tokens(graph) or _document_tokens(graph),
        "grid": list(run.grid) if run.grid else None,
        "prompt": run.prompt or _document_prompt(graph),
        "targets": _targets(graph, names, labels, features),
        "supernodes": {name: [names[node] for node in members] for name, members in graph.supernodes.items()},
        "start": _start(graph),
        "scores": to_json_values(provenance.scores) if provenance.scores else None,
        "identity": groups.model_dump(mode="json"),
        "facts": _facts(graph),
    }


def _tokens(graph: Graph) -> list[str]:
    """Returns the run's text tokens; where both branches of guidance have nodes, the prompt's | the negative one's."""
    run, branches = graph.provenance.known, {*graph.node_branch[graph.node_stream == TXT].tolist()}
    if NEGATIVE not in branches:
        return list(run.tokens or ())
    if branches == {NEGATIVE}:
        return list(run.negative_tokens)
    known = run.tokens or (), run.negative_tokens
    # Graphs that were combined may have had several prompts, or several negative ones.
    tokens, negative = (one or ["?"] * max(map(len, known)) for one in known)
    return [a if a == b else f"{a} | {b}" for a, b in zip(tokens, negative, strict=True)]


def _document_prompt(graph: Graph) -> str | None:
    """Returns the prompt that another tool's document tells."""
    prompt = (graph.provenance.viewer or {}).get("prompt")
    return prompt if isinstance(prompt, str) else None


def _document_tokens(graph: Graph) -> list[str]:
    """Returns the tokens that another tool's document tells; none unless there is one for every position."""
    tokens = (graph.provenance.viewer or {}).get("prompt_tokens")
    last = max(graph.node_position.max(initial=-1), graph.map_position.max(initial=-1))
    if not isinstance(tokens, list) or not 0 <= last < len(tokens) <= MOST_TOKENS or np.any(graph.node_stream != TXT):
        return []
    return [unicode_replaced(str(token)) for token in tokens]


def _block_names(graph: Graph) -> dict[str, str]:
    """Returns how every row of blocks is called, by number."""
    layout, outputs = graph.provenance.known.layout, graph.node_kind == OUTPUT
    block_names: dict[str, str] = {}
    for block in np.unique(graph.node_block).tolist():
        mine = graph.node_block == block
        if np.all(outputs[mine] | (graph.node_kind[mine] == MODULATION)) and np.any(outputs[mine]):
            block_names[str(block)] = "target"
        elif np.all(np.isin(graph.node_kind[mine], (INPUT, WORD))):
            block_names[str(block)] = "inputs"
        else:
            block_names[str(block)] = f"block {block}" if layout is None else layout.block_name(block)
    return block_names


def _targets(
    graph: Graph, names: Sequence[str], labels: Mapping[str, str], features: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns what the graph explains, in words too, each with its weight, and its pooled path if it was measured."""
    weights, paths = graph.root_weights, graph.provenance.pooled_path
    known = paths if len(paths) == graph.targets.size else ()
    return [
        {"node": node, "name": names[node], "weight": float(weights[node])}
        | {"why": target_title(names[node], labels.get(features[node], ""))}
        | ({"pooled": to_json_values(known[node])} if known else {})
        for node in graph.targets.tolist()
    ]


def _start(graph: Graph) -> dict[str, Any]:
    """Returns the thresholds at which a graph is shown first."""
    whole = graph.provenance.pruning is not None or graph.node_kind.size <= SMALL
    nodes, edges = (1.0, 1.0) if whole else STARTING
    for more in () if whole else MORE:
        seen = prune(graph, node_threshold=nodes, edge_threshold=edges, by_position=True).node_kind == FEATURE
        nodes = nodes if seen.sum() >= ENOUGH else more
    return {"mode": "standard", "node_threshold": nodes, "edge_threshold": edges}


def _guidance(run: KnownRun) -> str | None:
    """Returns guidance by two branches in words; graphs that were combined may have had several scales."""
    if run.negative_prompt is None:
        return None
    scale = "" if run.guidance is None else f"{run.guidance:g} "
    return f'{scale}away from "{run.negative_prompt}"'


def _facts(graph: Graph) -> list[list[str]]:
    """Returns where the graph comes from, in words."""
    provenance, run = graph.provenance, graph.provenance.known
    combined, pruning = provenance.combined, provenance.pruning
    facts = {
        "prompt": run.prompt or _document_prompt(graph),
        "guidance": _guidance(run),
        "seed": run.seed,
        "denoising steps": ", ".join(map(str, provenance.steps)) or run.step,
        "model": run.model and hash_text(run.model),
        "LoRA": texts_of(run.loras),
        "transcoders": provenance.transcoders and hash_text(provenance.transcoders),
        "pruned": pruning and f"{pruning.mode}, nodes {pruning.node_threshold:g}, edges {pruning.edge_threshold:g}",
        "combined": combined and f"{combined.operation} of {len(combined.graphs)} graphs",
        "products": provenance.precision and provenance.precision.products,
        "document": provenance.unclear_links and " ".join(provenance.unclear_links.sentences()),
        "grade": provenance.grade and str(provenance.grade),
        "made by": provenance.command and f"difffract {provenance.command}",
    }
    return [[key, unicode_replaced(str(value))] for key, value in facts.items() if value not in (None, "", ())]
