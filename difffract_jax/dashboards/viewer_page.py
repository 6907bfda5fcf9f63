"""A graph as one HTML file that shows itself, without a network, also straight from disk.

1. The script and the style sheet are the built bundle, `bundle/`; its sources are in `page/`.
2. Graphs and everything else that comes from outside lie in the file as base64 of deflated bytes, so that no text of a
   prompt, a label or a file name can be taken for markup; the page writes text as text.
3. A content security policy lets nothing but this script run, and nothing be fetched; a page that is served may post
   the groups to its own server.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from difffract_jax import __version__
from difffract_jax.dashboards.page_data import graph_bytes, packed
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups
from difffract_jax.graphs.names import node_name
from difffract_jax.text_files import unicode_replaced

BUNDLE = Path(__file__).parent / "bundle"
MARK = "\u2581"
"""Beginning of a word, in tokens of T5."""


class ShownImage(NamedTuple):
    """An image beside the graph.

    Attributes:
        address: `data:` address.
        step: whose predicted clean image it is; None for the finished one.
        size: width and height, in pixels, of the run's own image; None for a picture that was given, of any size.
    """

    address: str
    step: int | None = None
    size: tuple[int, int] | None = None


class PageParts(NamedTuple):
    """What a page shows beside its graph.

    Attributes:
        name: what files saved from the page are called.
        title: of the graph; what it explains if "".
        labels: what features stand for, by their names, img/3/f401.
        images: of the run, the finished one first.
        image_note: a sentence, where there is no image.
        groups: to open with.
        pages: address of a feature's page, with {feature} in place of its name; None if there are none.
        without_page: features that have none there, by their names.
        token: of the server that takes groups; None for a file.
        notebook: key by which a notebook knows the page that lies in it; None outside of notebooks.
        other: a second graph, to be shown beside it.
        other_title: of the second.
        other_images: of the second graph's run.
        other_image_note: a sentence, where the second graph has no image.
        difference: the first minus the second; None if they cannot be subtracted.
    """

    name: str = "graph"
    title: str = ""
    labels: Mapping[str, str] = {}
    images: Sequence[ShownImage] = ()
    image_note: str = ""
    groups: Groups | None = None
    pages: str | None = None
    without_page: Sequence[str] = ()
    token: str | None = None
    notebook: str | None = None
    other: Graph | None = None
    other_title: str = ""
    other_images: Sequence[ShownImage] = ()
    other_image_note: str = ""
    difference: Graph | None = None


def viewer_page(graph: Graph, parts: PageParts) -> str:
    """Returns the page of a graph.

    Args:
        graph: from `page_data.shown_graph`.
        parts: what is shown beside it.
    """
    script, style = (_bundled(name) for name in ("viewer.js", "viewer.css"))
    title = parts.title or node_name(graph, graph.target)
    data = {"graph": graph_bytes(graph, parts.labels, title=title), "extras": _extras(parts)}
    if parts.other is not None:
        data["graph-b"] = graph_bytes(parts.other, parts.labels, title=parts.other_title)
    if parts.difference is not None:
        data["graph-difference"] = graph_bytes(
            parts.difference, parts.labels, title="First minus second", tokens=_words_of_both(graph, parts.other)
        )
    blocks = "\n".join(f'<script type="text/plain" id="{key}">{packed(value)}</script>' for key, value in data.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="difffract_jax {__version__}">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="{_policy(script, parts)}">
<link rel="icon" href="data:,">
<title>{html.escape(unicode_replaced(title)[:200])}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws the graph with a script that lies in it; allow scripts for this page.</noscript>
<div id="viewer"></div>
{blocks}
<script>{script}</script>
</body>
</html>
"""


def _words_of_both(a: Graph, b: Graph | None) -> list[str] | None:
    """Returns the words of two prompts, place by place, both where they differ; None if their lengths do."""
    ours, theirs = (graph and graph.provenance.known.tokens for graph in (a, b))
    if not ours or not theirs or len(ours) != len(theirs):
        return None
    return [x if x == y else f"{x}/{y.removeprefix(MARK)}" for x, y in zip(ours, theirs, strict=True)]


def _bundled(name: str) -> str:
    return (BUNDLE / name).read_text(encoding="utf-8").strip()


def _policy(script: str, parts: PageParts) -> str:
    """Returns the rules under which a browser runs the page: this script alone, and no request."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'self'" if parts.token else "'none'",
        "frame-src": "'self' file:" if parts.pages else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{key} {value}" for key, value in rules.items())


def _extras(parts: PageParts) -> bytes:
    extras: dict[str, Any] = {
        "name": parts.name,
        "images": [image._asdict() for image in parts.images],
        "images_b": [image._asdict() for image in parts.other_images],
        "image_note": parts.image_note,
        "image_note_b": parts.other_image_note,
        "groups": parts.groups and parts.groups.model_dump(mode="json"),
        "pages": parts.pages,
        "without_page": list(parts.without_page),
        "server": parts.token and {"token": parts.token},
        "notebook": parts.notebook,
    }
    return json.dumps(extras).encode()
