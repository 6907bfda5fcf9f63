"""Exports to circuit-tracer's viewer and to Neuronpedia: the document, what the viewer looks for beside it, the image.

What can be refused is refused before anything is written; then come the document, the files of features, and the list
of graphs, so that the list names nothing that is not there.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difffract_jax.config import ExportConfig, UserError


def write_for_viewer(graph: Any, whole: Any, settings: ExportConfig, pinned: Sequence[str] = ()) -> dict[str, Any]:
    """Writes a graph for a viewer.

    Args:
        graph: to write, groups included.
        whole: as it was read.
        settings: of the export, `format` one of the two viewers'.
        pinned: names of nodes to pin beside the members of groups.

    Returns:
        What else to show: counts, the address, the list, the files of features, and whether there is an image.

    Raises:
        UserError: if the viewer would not take it, or what lies beside it would be lost.
    """
    from difffract_jax.graphs.files import viewer_json
    from difffract_jax.graphs.files.feature_files import write_feature_files
    from difffract_jax.graphs.files.viewer_index import add_to_index, read_index

    local = settings.format == "circuit-tracer"
    slug = settings.slug or viewer_json.slug_of(settings.out)
    if local and settings.out.name != f"{slug}.json" and viewer_json.SLUG.fullmatch(slug):
        raise UserError(
            f"circuit-tracer's viewer would look for {slug}.json, but the output is {settings.out.name}; name the "
            "output so, with letters, digits, dot, dash and underscore, or leave --slug out."
        )
    if local:
        read_index(settings.out.parent)
    image = _image(whole, settings)
    beside = (local and settings.scan is None) or (not local and settings.feature_url is not None)
    folder = settings.out.parent / viewer_json.feature_folder(slug)
    if settings.pages is not None and not beside:
        needed = "leave --scan out" if local else "give --feature-url"
        raise UserError(f"--pages goes into files of features, of which none are written; {needed}, or --pages.")
    records = _records(graph, settings) if beside else []
    if records:
        _check_folder(folder)
    named = settings.model_copy(update={"slug": slug, "labels": _labels_at_hand(whole) | settings.labels})
    how = {"image": image, "pinned": pinned}
    document = viewer_json.write_viewer_json(graph, settings.out, settings.format, named, **how)
    told = {"nodes": len(document["nodes"]), "links": len(document["links"]), "image": "yes" if image else "none"}
    if records:
        write_feature_files(records, folder, transcoders=graph.provenance.transcoders or "", overwrite=True)
        told["features"] = f"{folder}, {len(records)} files"
    if local:
        told["list"] = str(add_to_index(settings.out.parent, document["metadata"]))
        told["open"] = viewer_json.viewer_url(document)
    return told


def _labels_at_hand(whole: Any) -> dict[str, str]:
    """Returns what is known of the graph's features without a file of labels; names go with it, as many share one."""
    from difffract_jax.dashboards.page_labels import known_labels

    known = known_labels(whole, None)
    return {name: f"{label} · {name}" for name, label in known.items() if label}


def _image(whole: Any, settings: ExportConfig) -> str | None:
    """Returns the image of the run as an address, if one was given or is at hand."""
    from difffract_jax.cli.view import image_at_hand
    from difffract_jax.dashboards import image_files

    if settings.image is not None:
        return image_files.shown(image_files.read_image(settings.image)).address
    try:
        found = image_at_hand(whole, settings.graph)
    except UserError as error:
        sys.stderr.write(f"Note: {error}\n")
        return None
    known = not settings.by_position or whole.provenance.known.grid is not None
    return found.address if found is not None and known else None


def _records(graph: Any, settings: ExportConfig) -> list[Any]:
    """Returns what is known of the graph's features: where they are active in its run, and what a scan found."""
    from difffract_jax.dashboards.features.record import load_scan
    from difffract_jax.dashboards.features.viewer_records import with_scan
    from difffract_jax.graphs.files.run_features import run_features

    records = run_features(graph)
    return records if settings.pages is None else with_scan(records, graph, load_scan(settings.pages))


def _check_folder(folder: Path) -> None:
    """Refuses a folder of features that holds anything else, since it is replaced as a whole."""
    others = (
        [path.name for path in folder.iterdir() if not re.fullmatch(r"\d+\.json", path.name)] if folder.is_dir() else []
    )
    if others or (folder.exists() and not folder.is_dir()):
        held = f"holds {others[0]}" if others else "is a file"
        raise UserError(f"{folder} {held}, but features go there; move it, or name another output.")
