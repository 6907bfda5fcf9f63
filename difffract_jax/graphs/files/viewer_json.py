"""Graphs for circuit-tracer's local viewer and for Neuronpedia: one JSON format, two flavours (docs/viewers.md).

1. `viewer_nodes` says where nodes stand and what they are called; links name them.
2. `influence` is the share of all influence that a node holds together with those above it; from pruning where there
   was one, else of the graph as it is.
3. Supernodes and their members, pinned, are the view that the document opens with. `difffract` in the metadata says
   which graph it is, so that groups that are saved in it find back (`viewer_groups`).

What the viewers trip over is avoided here; each line that does so names the trap (docs/viewers.md).
"""

import gzip
import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from difffract_jax import __version__
from difffract_jax.config import UserError, ViewerOptions
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.files.viewer_image import FIELD as IMAGE
from difffract_jax.graphs.files.viewer_image import image_input
from difffract_jax.graphs.files.viewer_nodes import MARKUP, columns_of, padded, short, viewer_nodes
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.groups import identity, nodes_of
from difffract_jax.graphs.json_values import to_json_values
from difffract_jax.graphs.names import node_names
from difffract_jax.graphs.scoring import scores
from difffract_jax.storage.files import atomic_file

Flavour = Literal["circuit-tracer", "neuronpedia"]
GENERATOR = "difffract_jax"
MAX_PINNED = 200
SLUG = re.compile(r"[a-zA-Z0-9_.-]+")
UPLOAD_LEAST, UPLOAD_MOST = 1024, 100 * 2**20
"""Bytes that Neuronpedia accepts: the least gzipped, the most as written (trap 9)."""
NAME = "graph"
"""What a graph is called that has no other name."""


def write_viewer_json(
    graph: Graph,
    path: str | Path,
    flavour: Flavour,
    options: ViewerOptions,
    *,
    image: str | None = None,
    pinned: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a graph for a viewer, and returns the document written.

    Args:
        graph: any graph.
        path: file to write; it appears only when it is complete.
        flavour: whose viewer.
        options: how it is shown; without a slug the graph is called like the file.
        image: of the run, as a `data:` address; none if left out.
        pinned: names of nodes to pin beside the members of groups, as `groups.nodes_of` takes them.

    Raises:
        UserError: if the graph is too large for the viewers, or an option does not fit the flavour.
    """
    if options.slug is None:
        options = options.model_copy(update={"slug": slug_of(Path(path))})
    document = to_document(graph, flavour, options, image=image, pinned=pinned)
    if flavour == "neuronpedia":
        document = _uploadable(document)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def to_document(
    graph: Graph,
    flavour: Flavour,
    options: ViewerOptions,
    *,
    image: str | None = None,
    pinned: Sequence[str] = (),
) -> dict[str, Any]:
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
    tokens, column = columns_of(graph, text)
    nodes = viewer_nodes(graph, column, text, options)
    ids = [node["node_id"] for node in nodes]
    ends = zip(graph.edge_source, graph.edge_target, graph.edge_attribution, strict=True)
    metadata = _metadata(graph, flavour, scan, padded(tokens, nodes), nodes, options)
    return {
        "metadata": metadata | ({} if image is None else {IMAGE: image_input(graph, column, image)}),
        "qParams": _view(graph, nodes, pinned),
        "nodes": nodes,
        "links": [{"source": ids[s], "target": ids[t], "weight": short(value)} for s, t, value in ends],
    }


def slug_of(path: Path) -> str:
    """Returns what a graph is called after its file, by characters that a slug may hold.

    Args:
        path: the document to write.

    Example:
        >>> slug_of(Path("shown/a red circle.json"))
        'a-red-circle'
    """
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", path.stem).strip("-") or NAME


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
    slug = options.slug or NAME
    if not SLUG.fullmatch(slug):
        raise UserError(f"The slug may hold letters, digits, dot, dash and underscore alone, but got {slug!r}.")
    if flavour == "neuronpedia":
        if options.scan is None or not SLUG.fullmatch(options.scan):
            raise UserError(
                f"Neuronpedia needs the id of a model that it knows, letters, digits, dot, dash and underscore alone, "
                f"but got {options.scan!r}; pass --scan."
            )
        return options.scan
    scan = options.scan or f"./graph_data/{feature_folder(slug)}"
    if scan.startswith("./features"):
        raise UserError(
            f"circuit-tracer's viewer looks for {scan} on the web; name another folder, as ./graph_data/mine."
        )
    return scan


def feature_folder(slug: str) -> str:
    """Returns the name of the folder beside a document that holds what is known of its features (trap 11).

    Args:
        slug: of the graph.
    """
    return f"{slug}-features"


def _metadata(
    graph: Graph,
    flavour: Flavour,
    scan: str,
    tokens: list[str],
    nodes: Sequence[Mapping[str, Any]],
    options: ViewerOptions,
) -> dict[str, Any]:
    """Returns the document's metadata."""
    known, run = graph.provenance, graph.provenance.known
    told = known.scores.unpruned if known.scores is not None else scores(graph)
    settings = {"seed": run.seed, "step": run.step} | (to_json_values(known.attribution) or {})
    if known.attribution is not None:
        settings["max_feature_nodes"] = known.attribution.max_nodes
    source = {"feature_json_base_url": options.feature_url} if options.feature_url else {}
    # Neuronpedia reads files at an address where features are not said to be paired (trap 13).
    paired = {} if flavour == "neuronpedia" and source else {"schema_version": 1}
    return {
        "slug": options.slug or NAME,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": run.prompt or "",
        # The slider hides what lies above it: start where all that was kept is seen (trap 12).
        "node_threshold": max((n["influence"] for n in nodes if n["influence"] is not None), default=1.0),
        **paired,
        "feature_details": source,
        "info": {"generator": {"name": GENERATOR, "version": __version__}},
        "generation_settings": settings,
        "pruning_settings": to_json_values(known.pruning) or {},
        **{f"{name}_score": value for name, value in told._asdict().items() if value is not None},
        "scored_on": "the graph before pruning" if known.scores is not None else "this graph",
        "difffract": identity(graph).model_dump(mode="json"),
    }


def _view(graph: Graph, nodes: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, Any]:
    """Returns what is shown: supernodes of features alone; their members and others pinned, at most 200 (trap 5)."""
    pinned: list[str] = []
    groups: list[list[str]] = []
    names = node_names(graph)
    for name, group in graph.supernodes.items():
        inner = [n for n in group if graph.node_kind[n] == FEATURE and n >= graph.targets.size]
        ids = [nodes[n]["node_id"] for n in inner]
        if inner and len(pinned) + len(inner) <= MAX_PINNED:
            called = {names[n]: nodes[n]["clerp"] for n in inner}
            groups.append([_group_name(name, called), *ids])
            pinned += [member for member in ids if member not in pinned]
    others = [nodes[n]["node_id"] for n in nodes_of(graph, wanted)]
    pinned = [*pinned, *(one for one in others if one not in pinned)][:MAX_PINNED]
    return {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""}


def _group_name(name: str, members: Mapping[str, str]) -> str:
    """Returns what a group is called: one named by a member, `img/3/f401 and 2 more`, by what that is called."""
    first, _, more = name.partition(" and ")
    shown = f"{members[first]} and {more}" if first in members and more.endswith(" more") else name
    return shown.translate(MARKUP)


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
