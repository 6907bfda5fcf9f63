"""Graphs for circuit-tracer's local viewer and for Neuronpedia: one JSON format, two flavours (docs/viewers.md).

1. Columns: text positions first, then image positions, then latents, step beside step; one per stream where positions
   are summed over, which is how graphs of images are best exported.
2. A dictionary's number is k = 2 * block + (0 txt | 1 img), so that features of the two streams never share a file of
   examples; a feature's integer is Cantor's pairing of k and its index. Node names: `k_feature_column` for features,
   `E_stream_column` for inputs (0 txt, 1 img, 2 latent), `err_img_3_2` and `rest_img_3_2` for errors and unexpanded
   features, `K_i_column` for the i-th target, a logit to the viewers, with K past every k.
3. `influence` is the share of all influence that a node holds together with those above it; from pruning where there
   was one, else of the graph as it is.
4. Every node also carries `difffract`, its kind, step, stream, block, position and feature, for `graph_of`; an
   attention score also its head, and stream and position of its key. To the viewers it is an error, labelled by head.

What the viewers trip over is avoided here; each line that does so names the trap (docs/viewers.md).
"""

import gzip
import hashlib
import json
import re
import urllib.parse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from difffract_jax import __version__
from difffract_jax.address import IMG, LATENT, STREAMS, TXT
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import ERROR, FEATURE, INPUT, OUTPUT, SCORE, Graph
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.names import node_names, score_name
from difffract_jax.graphs.pruning import cumulative_shares, node_influence
from difffract_jax.graphs.scoring import scores
from difffract_jax.storage.files import atomic_file

Flavour = Literal["circuit-tracer", "neuronpedia"]
GENERATOR = "difffract_jax"
FEATURE_TYPE = "cross layer transcoder"
"""What the viewers call features, those of one layer's transcoder too."""
MAX_PINNED = 200
SLUG = re.compile(r"[a-zA-Z0-9_.-]+")
UPLOAD_LEAST, UPLOAD_MOST = 1024, 100 * 2**20
"""Bytes that Neuronpedia accepts: the least gzipped, the most as written (trap 9)."""
STREAM_CODE = {TXT: 0, IMG: 1, LATENT: 2}
IDENTITY = ("node_kind", "node_step", "node_stream", "node_block", "node_position", "node_feature")
SCORE_IDENTITY = ("node_head", "node_key_stream", "node_key_position")


def write_viewer_json(graph: Graph, path: str | Path, flavour: Flavour, options: ViewerOptions) -> dict[str, Any]:
    """Writes a graph for a viewer, and returns the document written.

    Args:
        graph: any graph.
        path: file to write; it appears only when it is complete.
        flavour: whose viewer.
        options: how it is shown.

    Raises:
        UserError: if the graph is too large for the viewers, or an option does not fit the flavour.
    """
    document = to_document(graph, flavour, options)
    if flavour == "neuronpedia":
        document = _uploadable(document)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def to_document(graph: Graph, flavour: Flavour, options: ViewerOptions) -> dict[str, Any]:
    """Returns the JSON document of a graph; arguments and errors as `write_viewer_json`."""
    scan = _scan(flavour, options)
    graph = graph if options.by_position else aggregate(graph)
    count, links = graph.node_kind.size, graph.edge_source.size
    if count > options.max_nodes or links > options.max_links:  # trap 7
        raise UserError(
            f"The graph has {count} nodes and {links} edges, more than the {options.max_nodes} and {options.max_links} "
            "that the viewers bear; prune it further, sum it over positions, or raise --max-nodes and --max-links."
        )
    text = options.tokens or list(graph.provenance.known.tokens or ())
    tokens, column = _columns(graph, text)
    nodes = _nodes(graph, column, options)
    ids = [node["node_id"] for node in nodes]
    ends = zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True)
    return {
        "metadata": _metadata(graph, flavour, scan, _padded(tokens, nodes), nodes, options),
        "qParams": _view(graph, ids, flavour, nodes),
        "nodes": nodes,
        "links": [{"source": ids[s], "target": ids[t], "weight": _short(value)} for s, t, value in ends],
    }


def cantor(k: int, feature: int) -> int:
    """Returns the viewers' integer of a feature: Cantor's pairing of its dictionary and its index."""
    return (k + feature) * (k + feature + 1) // 2 + feature


def dictionary_number(block: int, stream: int) -> int:
    """Returns k, the viewers' number of a site's dictionary; stream 0 is img, 1 txt."""
    return 2 * block + STREAM_CODE[stream]


def viewer_url(document: Mapping[str, Any], base: str = "http://localhost:8041/index.html") -> str:
    """Returns the address at which circuit-tracer's viewer shows a document with its supernodes.

    The viewer takes supernodes from the address alone. Its notebook reads the address after decoding all of it, so that
    characters with a meaning there may not stand in names.

    Args:
        document: from `to_document`.
        base: of the viewer.
    """
    view = document["qParams"]
    groups = [[re.sub(r"\s*[#&+%;?]+\s*", " ", name), *members] for name, *members in view["supernodes"]]
    query = {"slug": document["metadata"]["slug"], "pinnedIds": ",".join(view["pinnedIds"])}
    return f"{base}?{urllib.parse.urlencode(query | {'supernodes': json.dumps(groups)})}"


def _scan(flavour: Flavour, options: ViewerOptions) -> str:
    """Returns where features are found, or refuses what a viewer would not take (trap 11)."""
    if not SLUG.fullmatch(options.slug):
        raise UserError(f"The slug may hold letters, digits, dot, dash and underscore alone, but got {options.slug!r}.")
    if flavour == "neuronpedia":
        if options.scan is None or not SLUG.fullmatch(options.scan):
            raise UserError(
                f"Neuronpedia needs the id of a model that it knows, letters, digits, dot, dash and underscore alone, "
                f"but got {options.scan!r}; pass --scan."
            )
        return options.scan
    scan = options.scan or f"./feature_json/{options.slug}"
    if scan.startswith("./features"):
        raise UserError(f"circuit-tracer's viewer looks for {scan} on the web; name another folder, as ./feature_json.")
    return scan


def _columns(graph: Graph, text: list[str]) -> tuple[list[str], Int64[np.ndarray, "node"]]:
    """Returns the head of every column, and the column of every node; outputs stand in the last one of their step."""
    code = np.array([STREAM_CODE[stream] for stream in range(len(STREAMS))])[graph.node_stream]
    keys = list(zip(graph.node_step.tolist(), code.tolist(), graph.node_position.tolist(), strict=True))
    output = (graph.node_kind == OUTPUT).tolist()
    used = {key for key, is_output in zip(keys, output, strict=True) if not is_output}
    # Both streams at every step: features in a column each never fill two thirds of them (trap 4).
    missing = {(step, c, -1) for step, _, _ in keys for c in (0, 1)} - {(step, c, -1) for step, c, _ in used}
    columns = sorted(used | missing)
    number = {key: place for place, key in enumerate(columns)}
    last = {step: place for place, (step, _, _) in enumerate(columns)}
    grid = graph.provenance.known.grid
    several = len(last) > 1
    tokens = [_token(c, position, text, grid) + (f"#{step}" if several else "") for step, c, position in columns]
    places = [last[key[0]] if is_output else number[key] for key, is_output in zip(keys, output, strict=True)]
    return tokens, np.array(places, np.int64)


def _token(code: int, position: int, text: list[str], grid: Any) -> str:
    stream = ("txt", "img", "latent")[code]
    if position < 0:
        return stream
    if code == 0:
        return text[position] if position < len(text) else f"txt[{position}]"
    return f"{stream}[{position // grid[1]},{position % grid[1]}]" if grid else f"{stream}[{position}]"


def _nodes(graph: Graph, column: Int64[np.ndarray, "node"], options: ViewerOptions) -> list[dict[str, Any]]:
    """Returns the document's nodes."""
    names, targets = node_names(graph), graph.targets.size
    inner = np.arange(graph.node_kind.size) >= targets
    numbered = graph.node_block[inner & (graph.node_block >= 0)]
    if not numbered.size:  # trap 3
        raise UserError("The graph has no features or errors besides its targets, which the viewers cannot show.")
    shift = int(numbered.max() == 0)  # trap 3 again: a highest layer of 0 counts as none
    top, past = int(numbered.max()) + shift + 1, 2 * int(graph.node_block.max()) + 2
    shares = graph.node_cumulative
    if np.isnan(shares).any():
        shares = cumulative_shares(node_influence(graph))
    nodes = []
    for node in range(graph.node_kind.size):
        common = {
            "ctx_idx": int(column[node]),
            "clerp": options.labels.get(names[node], ""),
            "influence": _short(shares[node]),
            "activation": _short(graph.node_value[node]) if graph.node_kind[node] == FEATURE else None,
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        if node < targets:
            own = _target(graph, node, int(column[node]), top, past, names[node])
        else:
            own = _source(graph, node, int(column[node]), shift, options)
        more = SCORE_IDENTITY if graph.node_kind[node] == SCORE else ()
        identity = [int(getattr(graph, name)[node]) for name in (*IDENTITY, *more)]
        nodes.append({**own, **{k: v for k, v in common.items() if k not in own}, "difffract": identity})
    return nodes


def _target(graph: Graph, node: int, column: int, top: int, past: int, name: str) -> dict[str, Any]:
    """Returns what is a target's own: a logit to the viewers, whose label must hold its share (trap 2)."""
    share = float(graph.root_weights[node])
    return {
        "node_id": f"{past}_{node}_{column}",
        "feature": node,
        "layer": str(top),
        "feature_type": "logit",
        "jsNodeId": f"L_{node}-{column}",
        "clerp": f'Output "{name}" (p={share:.3f})',
        "influence": None,
        "token_prob": share,
        "is_target_logit": node == 0,
    }


def _source(graph: Graph, node: int, column: int, shift: int, options: ViewerOptions) -> dict[str, Any]:
    """Returns what is a feature's, an error's or an input's own; `feature` is always an integer (trap 6)."""
    kind, stream, block = int(graph.node_kind[node]), int(graph.node_stream[node]), int(graph.node_block[node])
    if kind == INPUT:
        name = f"E_{STREAM_CODE[stream]}"
        return {
            "node_id": f"{name}_{column}",
            "feature": column,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"{name}-{column}",
        }
    layer = str(block + shift)
    if kind == FEATURE:
        k, feature = dictionary_number(block, stream), int(graph.node_feature[node])
        link = {"vis_link": f"{options.dashboard}/{STREAMS[stream]}_{block}/{feature}"} if options.dashboard else {}
        return {
            "node_id": f"{k}_{feature}_{column}",
            "feature": cantor(k, feature),
            "layer": layer,
            "feature_type": FEATURE_TYPE,
            "jsNodeId": f"{k}_{feature}-0",
        } | link
    if kind == SCORE:
        head, key = int(graph.node_head[node]), f"{STREAMS[graph.node_key_stream[node]]}{graph.node_key_position[node]}"
        name = f"attn_{head}_{key}_{STREAMS[stream]}_{block}_{column}"
        return {
            "node_id": name,
            "feature": -4 - head,
            "layer": layer,
            "feature_type": "mlp reconstruction error",
            "jsNodeId": name,
            "clerp": f"Attention: {score_name(graph, node)}",
        }
    # Four parts, so that no error is taken for a feature (traps 1 and 5); -1 and -2, so that the two kinds are not
    # taken for one feature that is everywhere (trap 4).
    name = f"{'err' if kind == ERROR else 'rest'}_{STREAMS[stream]}_{block}_{column}"
    return {
        "node_id": name,
        "feature": -1 if kind == ERROR else -2,
        "layer": layer,
        "feature_type": "mlp reconstruction error",
        "jsNodeId": name,
        "clerp": f"{'Err' if kind == ERROR else 'Rest'}: {STREAMS[stream]} L{block}",
    }


def _padded(tokens: list[str], nodes: list[dict[str, Any]]) -> list[str]:
    """Returns the columns' heads, with empty columns added until no feature fills two thirds of them (trap 4)."""
    often = Counter((n["layer"], n["feature"], n["ctx_idx"] if "error" in n["feature_type"] else -1) for n in nodes)
    wanted = -(-3 * max(often.values()) // 2)
    return tokens + [" "] * max(0, wanted - len(tokens))


def _metadata(
    graph: Graph, flavour: Flavour, scan: str, tokens: list[str], nodes: list[dict[str, Any]], options: ViewerOptions
) -> dict[str, Any]:
    """Returns the document's metadata."""
    known, run = graph.provenance, graph.provenance.known
    told = known.scores.unpruned if known.scores is not None else scores(graph)
    settings = {"seed": run.seed, "step": run.step} | (to_json_values(known.attribution) or {})
    if known.attribution is not None:
        settings["max_feature_nodes"] = known.attribution.max_nodes
    source = {"feature_json_base_url": options.feature_url} if options.feature_url else {}
    return {
        "slug": options.slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": run.prompt or "",
        # The slider hides what lies above it: start where all that was kept is seen (trap 12).
        "node_threshold": max((n["influence"] for n in nodes if n["influence"] is not None), default=1.0),
        "schema_version": 1,
        "feature_details": source,
        "info": {"generator": {"name": GENERATOR, "version": __version__}},
        "generation_settings": settings,
        "pruning_settings": to_json_values(known.pruning) or {},
        **{f"{name}_score": value for name, value in told._asdict().items() if value is not None},
        "scored_on": "the graph before pruning" if known.scores is not None else "this graph",
    }


def _view(graph: Graph, ids: list[str], flavour: Flavour, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what is selected: supernodes, of features alone, and their members pinned (trap 5), at most 200."""
    pinned: list[str] = []
    groups = []
    for name, group in graph.supernodes.items():
        inner = [ids[n] for n in group if graph.node_kind[n] == FEATURE and n >= graph.targets.size]
        if inner and len(pinned) + len(inner) <= MAX_PINNED:
            groups.append([name, *inner])
            pinned += [member for member in inner if member not in pinned]
    view = {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}
    labelled = {str(n["feature"]): n["clerp"] for n in nodes if n["feature_type"] == FEATURE_TYPE and n["clerp"]}
    if labelled and flavour == "circuit-tracer":
        view["clerps"] = json.dumps([[feature, label] for feature, label in labelled.items()])
    return view


def _uploadable(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the document within the sizes that Neuronpedia accepts, or refuses it (trap 9)."""
    text = json.dumps(document, indent=1).encode()
    if len(text) > UPLOAD_MOST:
        raise UserError(f"The document has {len(text)} bytes, more than the {UPLOAD_MOST} of an upload; prune further.")
    missing = UPLOAD_LEAST - len(gzip.compress(text, mtime=0))
    if missing <= 0:
        return document
    blocks = -(-missing // 32) + 1
    filler = "".join(hashlib.sha256(bytes([place])).hexdigest() for place in range(blocks))
    return document | {"metadata": document["metadata"] | {"filler": filler}}


def _short(value: Any) -> float:
    """Returns the shortest decimal number that is this one in float32."""
    return float(str(np.float32(value)))
