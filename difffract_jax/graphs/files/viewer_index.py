"""`graph-metadata.json`: the list of graphs in a folder that circuit-tracer's viewer offers.

Without it the viewer shows a blank page. Each entry is a graph's metadata, by its slug; what it needs of them is kept,
so that an image is not in the list too. Entries of other graphs, and what else the file holds, stay as they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.graphs.files.json_text import load_json
from difffract_jax.storage.files import atomic_file

NAME = "graph-metadata.json"
KEPT = ("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")


def read_index(folder: Path) -> dict[str, Any]:
    """Reads the list of a folder.

    Args:
        folder: of graphs.

    Returns:
        The list; one without graphs if there is none.

    Raises:
        UserError: if the file of that name is another.
    """
    path = folder / NAME
    if not path.exists():
        return {"graphs": []}
    try:
        index = load_json(path)
    except UserError:
        index = None
    graphs = index.get("graphs") if isinstance(index, dict) else None
    if not isinstance(graphs, list) or not all(isinstance(one, dict) for one in graphs):
        raise UserError(
            f"{path} is not the list of graphs that circuit-tracer's viewer reads, into which this one is to go; move "
            "it, or name another folder with --out."
        )
    return index


def add_to_index(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Puts a graph into the list of its folder, in place of one of its slug.

    Args:
        folder: that the graph lies in as SLUG.json.
        metadata: of its document.

    Returns:
        The file.

    Raises:
        UserError: if the file of that name is another.
    """
    index = read_index(folder)
    others = [one for one in index["graphs"] if one.get("slug") != metadata["slug"]]
    entry = {key: metadata[key] for key in KEPT if key in metadata}
    with atomic_file(folder / NAME) as partial:
        text = json.dumps(index | {"graphs": [*others, entry]}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
    return folder / NAME
