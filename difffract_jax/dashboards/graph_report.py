"""A report of any graph as one HTML file: the image, what adds up to the target, the circuit, its features (NumPy).

What `validate` and `steer` wrote for the graph goes in where it is given; nothing is computed anew.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from difffract_jax.address import IMG, TXT
from difffract_jax.config import UserError
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.image_files import read_image
from difffract_jax.dashboards.image_files import shown as shown_image
from difffract_jax.dashboards.page_data import summed_where_possible
from difffract_jax.dashboards.records import Card, card, edges_among, top_features
from difffract_jax.dashboards.render import Picture, Section, drawing, feature_card, render
from difffract_jax.dashboards.viewer_page import ShownImage
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups, identity, with_groups, without_position
from difffract_jax.graphs.influence import node_influence
from difffract_jax.graphs.names import feature_names, node_name, node_names

LEAST_SHARE = 0.004
"""Share of a target's edges from which on an edge is drawn."""


def graph_report(
    graph: Graph,
    *,
    labels: Mapping[str, str],
    images: Sequence[ShownImage],
    image_note: str,
    groups: Groups | None,
    top: int,
    validation: Path | None,
    edit: Path | None,
) -> str:
    """Returns the report as HTML.

    Args:
        graph: any graph.
        labels: what features stand for, by their names.
        images: of the run, the finished one first.
        image_note: a sentence, where there is none.
        groups: made by hand, or None.
        top: features to show.
        validation: directory of `validate`, or None.
        edit: directory of `steer`, or None.

    Raises:
        UserError: if a directory is not what it should be.
    """
    summed = summed_where_possible(graph)
    summed = replace(summed, node_influence=node_influence(summed).astype(np.float32))
    if groups is not None:
        summed = with_groups(summed, groups)
    target, run = node_name(summed, summed.target), graph.provenance.known
    prompt = "" if run.prompt is None else f" The prompt was: {run.prompt}."
    summary = [f"What makes `{target}` what it is, traced through the model.{prompt}"]
    sections = [_images(images, image_note), _sum(summed), *_circuit(summed, labels, images, top)]
    sections += _groups(summed) + _edit(edit, graph) + _validation(validation, graph)
    record = json.dumps(graph.provenance.to_json(), indent=2)
    return render(f"Why {target}", summary, [section for section in sections if section is not None], record)


def _images(images: Sequence[ShownImage], note: str) -> Section:
    if not images:
        return Section("The image", [note])
    captions = [
        "The finished image." if one.step is None else f"What step {one.step} predicts it to be." for one in images
    ]
    pictures = [Picture(one.address, text, small=True) for one, text in zip(images, captions, strict=True)]
    return Section("The image", [], pictures)


def _sum(graph: Graph) -> Section:
    told = account(graph)
    rows = [
        {"part": "features", "adds": told.features, "what it is": "what the circuit's features add directly"},
        {
            "part": "inputs",
            "adds": told.inputs,
            "what it is": "the prompt's embedding and the noisy image",
        },
        {"part": "errors", "adds": told.errors, "what it is": "what the transcoders do not reconstruct"},
        {"part": "rest", "adds": told.rest, "what it is": "active features that were not followed"},
        {"part": "not in the file", "adds": told.absent, "what it is": "edges too weak to be kept, or cut by pruning"},
    ]
    if told.attention:
        what = "where heads attend, to first order; the bias holds as much with the opposite sign"
        rows.insert(-1, {"part": "attention", "adds": told.attention, "what it is": what})
    if told.bias is not None:
        rows.append({"part": "bias", "adds": told.bias, "what it is": "all sources at zero"})
        rows.append({"part": "the target", "adds": told.value, "what it is": "the sum of the above"})
        words = ["With attention and norms held at this run, the target is the sum of these parts."]
    else:
        total = told.features + told.inputs + told.errors + told.rest + told.attention + told.absent
        rows.append({"part": "sum of edges", "adds": total, "what it is": "the sum of the above"})
        words = ["The file does not tell the target's bias, so these parts add up to the sum of its edges alone."]
    for path in graph.provenance.pooled_path:
        words.append(
            "The prompt also acts through one pooled vector, which is held fixed and has no nodes: with the empty "
            f"prompt's, the target would be {path.without:.3g} instead of {path.value:.3g}."
        )
    return Section("What adds up to the target", words, (), {"": rows})


def _circuit(graph: Graph, labels: Mapping[str, str], images: Sequence[ShownImage], top: int) -> list[Section]:
    nodes = top_features(graph, top)
    names, features = node_names(graph), feature_names(graph)
    cards = [_card(graph, node, labels.get(features[node], ""), images) for node in nodes]
    drawn = [*nodes, int(graph.target)]
    blocks = sorted({int(graph.node_block[node]) for node in drawn})
    layout = graph.provenance.known.layout
    heads = [f"block {block}" if layout is None else layout.block_name(block) for block in blocks]
    heads[-1] = "target" if blocks[-1] == int(graph.node_block[graph.target]) else heads[-1]
    laid = drawing(
        [names[node] for node in drawn],
        [labels.get(features[node], "") for node in drawn],
        [blocks.index(int(graph.node_block[node])) for node in drawn],
        heads,
        [edge for edge in edges_among(graph, drawn) if abs(edge[2]) > LEAST_SHARE],
    )
    words = [
        f"The {len(nodes)} features with the most influence on the target, over all paths, of {len(graph.node_kind)} "
        "nodes. In the drawing columns are blocks; a line's width is its share of all that enters its end, blue raises "
        "it, dashed orange lowers it.",
    ]
    shown = [one for one in cards if one is not None]
    circuit = Section("The circuit", words, drawing=laid if nodes else None)
    return [circuit, Section("Its features", (), cards=shown)] if shown else [circuit]


def _card(graph: Graph, node: int, label: str, images: Sequence[ShownImage]) -> Mapping[str, Any] | None:
    """Returns a feature's card; None where the graph does not say where its positions are."""
    run = graph.provenance.known
    if graph.node_stream[node] not in (IMG, TXT) or run.layout is None:
        return None
    if (run.grid if graph.node_stream[node] == IMG else run.tokens) is None:
        return None
    made = card(graph, node)._replace(detects=label)
    return feature_card(made, _pixels(made, images))


def _pixels(made: Card, images: Sequence[ShownImage]) -> np.ndarray:
    """Returns the finished image in a size that heat can be laid over, or grey where there is none."""
    if made.heat is None:
        return np.zeros((1, 1, 3), np.uint8)
    rows, columns = made.heat.shape
    each = max(1, -(-192 // rows))
    if not images:
        return np.full((rows * each, columns * each, 3), 200, np.uint8)
    return np.asarray(_decoded(images[0]).resize((columns * each, rows * each)))


def _decoded(image: ShownImage) -> Any:
    """Returns the image of a `data:` address as Pillow's."""
    return Image.open(io.BytesIO(base64.b64decode(image.address.partition(",")[2]))).convert("RGB")


def _groups(graph: Graph) -> list[Section]:
    if not graph.supernodes:
        return []
    names = node_names(graph)
    rows = [{"group": name, "features": ", ".join(names[n] for n in group)} for name, group in graph.supernodes.items()]
    return [Section("Groups of features", ["Features that do the same."], (), {"": rows})]


def _edit(directory: Path | None, graph: Graph) -> list[Section]:
    if directory is None:
        return []
    told = _json(directory / "metrics.json", "difffract steer")
    try:
        _check_origin(told["sources"], graph, directory / "metrics.json")
        rows = [
            {key: value for key, value in row.items() if not isinstance(value, dict | list)} for row in told["metrics"]
        ]
        words = [f"Edits: {', '.join(told['settings']['edit'])}. The prompt was: {told['settings']['prompt']}."]
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(directory / "metrics.json", "difffract steer") from None
    picture = Picture(shown_image(read_image(directory / "grid.png")).address, "A row per seed, a column per strength.")
    return [Section("An edit, before and after", words, [picture], {"What changed": rows})]


def _validation(directory: Path | None, graph: Graph) -> list[Section]:
    if directory is None:
        return []
    path = directory / "validation.json"
    told = _json(path, "difffract validate")
    try:
        _check_origin(told["provenance"]["sources"], graph, path)
        rows = [{key: row[key] for key in ("check", "worst", "median", "bar", "holds")} for row in told["exactness"]]
        theirs = {row["of"].partition("#")[0] for row in told["perturbation"]["rows"]}
        theirs |= {without_position(name) for name in theirs}  # documents of other tools name targets so
        about = told["provenance"]["settings"]["graph"]
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(path, "difffract validate") from None
    ours = identity(graph).targets
    if theirs.isdisjoint(name.partition("#")[0] for name in ours):
        raise UserError(f"{path} is about another graph, {about}, not one of {', '.join(ours)}; validate this one.")
    captions = {
        "perturbation.png": "Features taken off one at a time in the real model: changes against predictions.",
        "completeness.png": "Circuits of growing size: what they recover, and what is lost without them.",
    }
    pictures = [Picture(shown_image(read_image(directory / name)).address, text) for name, text in captions.items()]
    words = [f"What `difffract validate` found for `{about}`."]
    return [Section("How far to trust it", words, pictures, {"Exact in the frozen model": rows})]


def _check_origin(sources: Mapping[str, str], graph: Graph, path: Path) -> None:
    """Refuses what was found with another model or other transcoders than the graph's."""
    ours = {"model": graph.provenance.known.model, "transcoders": graph.provenance.transcoders}
    for what, known in ours.items():
        theirs = sources.get(what)
        if None not in (known, theirs) and known != theirs:
            raise UserError(
                f"{path} was made with another {what} ({str(theirs)[:12]}...) than the graph ({str(known)[:12]}...); "
                "give what was made with the graph's own."
            )


def _json(path: Path, command: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _unreadable(path, command) from None


def _unreadable(path: Path, command: str) -> UserError:
    return UserError(f"{path} cannot be read; give the directory that `{command}` wrote.")
