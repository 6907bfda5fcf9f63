"""Folders of feature pages for tests that read their addresses alone: index, record and lists, without a scan."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from difffract_jax.dashboards.features.pages import folder_of, write_script
from difffract_jax.dashboards.features.record import FOLDER, FORMAT_VERSION, KIND, write_record


def make_folder(folder: Path, transcoders: str, features: Mapping[str, Sequence[int]]) -> Path:
    """Writes a folder that says it holds pages of some features, and returns it.

    Args:
        folder: to write.
        transcoders: content hash of those whose features they are.
        features: site, img/1, -> numbers of features that have a page.
    """
    sites = {site: {"streams": ["img"], "tokens": 1} for site in features}
    config = {"format_version": FORMAT_VERSION, "kind": KIND, "transcoders": transcoders, "sites": sites}
    config |= {
        "model": "m",
        "seed": 0,
        "prompts": 1,
        "features": 1,
        "run": {"steps": 1, "grid": [1, 1], "text_tokens": 1},
    }
    write_record(folder / FOLDER, config, ("a prompt",))
    for site, numbers in features.items():
        write_script(folder / "data" / folder_of(site) / "list.js", "list", site, {"feature": list(numbers)})
    (folder / "index.html").write_text("<!doctype html>", encoding="utf-8")
    return folder
