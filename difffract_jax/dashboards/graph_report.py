"""A report of any graph as one HTML file: the image, the circuit, its features, what adds up to the target (NumPy).

What `validate` and `steer` wrote for the graph goes in where it is given; nothing is computed anew. `difffract demo`
ends in the same report.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from difffract_jax.address import IMG, TXT
from difffract_jax.dashboards.account import account
from difffract_jax.dashboards.found_sections import edit_sections, validation_sections
from difffract_jax.dashboards.image_files import shown as shown_image
from difffract_jax.dashboards.page_data import summed_where_possible
from difffract_jax.dashboards.pictures import SHOWN
from difffract_jax.dashboards.records import Card, card, edges_among, top_features
from difffract_jax.dashboards.render import Picture, Section, drawing, feature_card, render
from difffract_jax.dashboards.target_words import target_box, target_title, target_words
from difffract_jax.dashboards.viewer_page import ShownImage
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups, with_groups
from difffract_jax.graphs.influence import node_influence
from difffract_jax.graphs.names import evaluation_marks, feature_names, node_name, node_names

LEAST_SHARE = 0.004
"""Share of a target's edges from which on an edge is drawn."""
MOST_GROUPS = 6
"""Groups that are listed, the strongest."""


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
    lead: Sequence[str] = (),
) -> str:
    """Returns the report as HTML.

    Args:
        graph: any graph; its groups are listed.
        labels: what features stand for, by their names.
        images: of the run, the finished one first.
        image_note: a sentence, where there is none.
        groups: made by hand, or None.
        top: features to show.
        validation: directory of `validate`, or None.
        edit: directory of `steer`, or None.
        lead: paragraphs at its head, before what is said of any graph.

    Raises:
        UserError: if a directory is not what it should be.
    """
    summed = summed_where_possible(graph)
    summed = replace(summed, node_influence=node_influence(summed).astype(np.float32))
    if groups is not None:
        summed = with_groups(summed, groups)
    name, label = node_name(summed, summed.target), labels.get(feature_names(summed)[summed.target], "")
    target = name.removesuffix(evaluation_marks(summed)[summed.target])
    sections = [_images(images, image_note, target), *_circuit(summed, labels, images, top), _sum(summed)]
    sections += _groups(summed, labels) + edit_sections(edit, graph) + validation_sections(validation, graph)
    record = json.dumps(graph.provenance.to_json(), indent=2)
    return render(target_title(target, label), [*lead, _summary(graph, name, target, label)], sections, record)


def _summary(graph: Graph, name: str, target: str, label: str) -> str:
    """Returns what the report is about: the prompt, and the target in words."""
    run = graph.provenance.known
    steps = graph.provenance.steps or (() if run.step is None else (run.step,))
    read = "" if not steps else f" It is read in denoising step {steps[-1]}, counted from 0"
    read += ", off the image that this step predicts." if read and target.startswith("pixels:") else "." if read else ""
    prompt = "" if run.prompt is None else f"The prompt was: {run.prompt}. "
    value = account(graph).value
    worth = "" if value is None else f" Its value is {value:.3g}."
    return f"{prompt}The target is `{name}`: {target_words(target, label)}.{read}{worth}"


def _images(images: Sequence[ShownImage], note: str, target: str) -> Section:
    if not images:
        return Section("The image", [note])
    images = [images[0], *(one for one in images[1:] if one.address != images[0].address)]  # the last step predicts it
    captions = [
        "The finished image." if one.step is None else f"What step {one.step} predicts it to be." for one in images
    ]
    pictures = [Picture(_outlined(one, target), text, small=True) for one, text in zip(images, captions, strict=True)]
    outlined = any(picture.address != one.address for picture, one in zip(pictures, images, strict=True))
    words = ["The box in white and black is the target's."] if outlined else []
    return Section("The image", words, pictures)


def _outlined(image: ShownImage, target: str) -> str:
    """Returns the address of an image with the target's box drawn on it; its own where there is none, or no size."""
    box = target_box(target)
    if box is None or image.size is None:
        return image.address
    pixels = _decoded(image)
    scale = max(1, -(-SHOWN // min(pixels.size)))
    large = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)
    across, down = large.width / image.size[0], large.height / image.size[1]
    corners = box[0] * across, box[1] * down, box[2] * across - 1, box[3] * down - 1
    pen = ImageDraw.Draw(large)
    for inset, colour in ((0, "black"), (1, "white")):
        pen.rectangle(tuple(at + inset * sign for at, sign in zip(corners, (1, 1, -1, -1), strict=True)), None, colour)
    return shown_image(large).address


def _sum(graph: Graph) -> Section:
    parts = account(graph)
    rows = [
        {"part": "features", "adds": parts.features, "what it is": "what the circuit's features add directly"},
        {
            "part": "inputs",
            "adds": parts.inputs,
            "what it is": "the prompt's embedding and the noisy image",
        },
        {"part": "errors", "adds": parts.errors, "what it is": "what the transcoders do not reconstruct"},
        {"part": "rest", "adds": parts.rest, "what it is": "active features that were not followed"},
        {"part": "not in the file", "adds": parts.absent, "what it is": "edges too weak to be kept, or cut by pruning"},
    ]
    if parts.attention:
        what = "where heads attend, to first order; the bias holds as much with the opposite sign"
        rows.insert(-1, {"part": "attention", "adds": parts.attention, "what it is": what})
    if parts.pooled:
        what = (
            "what shifts, scales and gates bring, whatever answers them; the bias holds as much with the opposite sign"
        )
        rows.insert(-1, {"part": "pooled path", "adds": parts.pooled, "what it is": what})
    if parts.bias is not None:
        rows.append({"part": "bias", "adds": parts.bias, "what it is": "all sources at zero"})
        rows.append({"part": "the target", "adds": parts.value, "what it is": "the sum of the above"})
        words = ["With attention and norms held at this run, the target is the sum of these parts."]
    else:
        nodes = parts.features + parts.inputs + parts.errors + parts.rest
        total = nodes + parts.attention + parts.pooled + parts.absent
        rows.append({"part": "sum of edges", "adds": total, "what it is": "the sum of the above"})
        words = ["The file does not tell the target's bias, so these parts add up to the sum of its edges alone."]
    paths, names = graph.provenance.pooled_path, node_names(graph)
    held = "" if graph.provenance.pooled else " and has no nodes"
    for target, path in enumerate(paths):
        called = f"the target {names[target]}" if len(paths) > 1 else "the target"
        words.append(
            f"The prompt also acts through one pooled vector, which is held fixed{held}: with the empty prompt's, "
            f"{called} would be {path.without:.3g} instead of {path.value:.3g}."
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
        [*(labels.get(features[node], "") for node in nodes), "the target"],
        [blocks.index(int(graph.node_block[node])) for node in drawn],
        heads,
        [edge for edge in edges_among(graph, drawn) if abs(edge[2]) > LEAST_SHARE],
    )
    share = float(graph.node_influence[nodes].sum())
    words = [
        f"The {len(nodes)} features with the most influence on the target, over all paths, of {len(graph.node_kind)} "
        f"nodes; {share:.0%} of all influence is theirs. In the drawing columns are blocks; a line's width is its "
        "share of all that enters its end, blue raises it, dashed orange lowers it. Point at a box or a line for "
        "names and figures.",
    ]
    shown = [one for one in cards if one is not None]
    circuit = Section("The circuit", words, drawing=laid if nodes else None)
    about = ["Orange is where a feature is active, over the image's tokens or the prompt's words."]
    if any(labels.get(features[node]) for node in nodes):
        about[0] += (
            " Under its name stands what it detects on other images, in brackets how well it tells tokens with it from "
            "tokens without (AUROC: 0.5 is chance, 1 always right)."
        )
    return [circuit, Section("Its features", about, cards=shown)] if shown else [circuit]


def _card(graph: Graph, node: int, label: str, images: Sequence[ShownImage]) -> Mapping[str, Any] | None:
    """Returns a feature's card; None where the graph does not say where its positions are."""
    run = graph.provenance.known
    if graph.node_stream[node] not in (IMG, TXT) or run.layout is None:
        return None
    if (run.grid if graph.node_stream[node] == IMG else run.tokens) is None:
        return None
    made = card(graph, node, label)
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


def _groups(graph: Graph, labels: Mapping[str, str]) -> list[Section]:
    if not graph.supernodes:
        return []
    names, features = node_names(graph), feature_names(graph)

    def called(node: int) -> str:
        return names[node] + (f": {label}" if (label := labels.get(features[node], "")) else "")

    strength = {name: float(graph.node_influence[members].sum()) for name, members in graph.supernodes.items()}
    shown = sorted(graph.supernodes, key=lambda name: -strength[name])[:MOST_GROUPS]
    rows = [
        {
            "group": name,
            "influence": f"{strength[name]:.1%}",
            "features": "; ".join(map(called, graph.supernodes[name])),
        }
        for name in shown
    ]
    more = len(graph.supernodes) - len(shown)
    words = ["Features that do the same, by their edges and by where they are active."]
    words[0] += f" The {len(shown)} groups with the most influence, of {more + len(shown)}." if more else ""
    return [Section("Groups of features", words, (), {"": rows})]
