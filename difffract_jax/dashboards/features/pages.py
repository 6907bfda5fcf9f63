"""The folder of pages: what a scan found as script files, pictures as sprite sheets, and the page that reads them.

    index.html pages.css pages.js     the page, the same for every scan; index.html#img/1/f159 opens a feature
    data/index.js                     the scan: sites, steps, sizes
    data/img-1/list.js                a row per feature of the site, column by column
    data/img-1/0003.js  0003.png      `CHUNK` features each; their effects on pixels
    data/prompts/0003.js              `CHUNK` prompts each: text, tokens, seed
    data/thumbs/0003.png              `SHEET` images each

Browsers do not let a page fetch files from a disk, but let it load scripts: each file of data is one call of a function
with a JSON value. Nothing in it is markup; the page shows every text as text. A page reads the list of its site, one
chunk, and the prompts and sheets of its examples, whatever the number of features.
"""

import base64
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from difffract_jax.dashboards.features.effects import Effects
from difffract_jax.dashboards.features.links import Links, Strongest
from difffract_jax.dashboards.features.record import SiteScan, flag_of, place_of, tokens_of
from difffract_jax.dashboards.features.texts import Text
from difffract_jax.storage.files import atomic_file

ASSETS = Path(__file__).parents[1] / "templates" / "features"
CHUNK = 64
"""Features, or prompts, of a file of data."""
SHEET = 16
"""Thumbnails of a sprite sheet."""
PHOTOGRAPH = 64
"""Pixels along a side from which on thumbnails are kept as JPEG."""
THUMB_KINDS = ("jpg", "png")
"""Kinds of files that thumbnails are kept in: of photographs, and of small pictures."""


class SitePages(NamedTuple):
    """What the pages of one site show.

    Attributes:
        name: of the site.
        number: its place among the sites of the scan.
        scan: what was found.
        maps: of its features' examples.
        effects: of its features on pixels; None for a site of text alone.
        links: of all sites.
        texts: what features are called.
        edges: of a graph, by feature.
        wanted: features that get a page, ascending.
    """

    name: str
    number: int
    scan: SiteScan
    maps: UInt8[np.ndarray, "feat shown cells"]
    effects: Effects | None
    links: Links
    texts: Mapping[str, Text]
    edges: Mapping[str, Any]
    wanted: Int[np.ndarray, "wanted"]


def write_assets(folder: Path) -> None:
    """Copies the page, its style and its script."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(ASSETS.iterdir()):
        shutil.copyfile(path, folder / path.name)


def write_script(path: Path, call: str, *arguments: Any) -> None:
    """Writes a file of data: one call of a function of the page.

    Args:
        path: the file.
        call: name of the function.
        arguments: JSON values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Non-ASCII characters are escaped, so that the file reads the same whatever a browser takes its encoding to be.
    values = ",".join(json.dumps(value, separators=(",", ":"), allow_nan=False) for value in arguments)
    with atomic_file(path) as partial:
        partial.write_text(f"difffract.{call}({values});\n", encoding="ascii")


def folder_of(site: str) -> str:
    """Returns the folder of a site's data."""
    return site.replace("/", "-")


def write_list(folder: Path, site: SitePages, config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the list of a site's features.

    Args:
        folder: of the pages.
        site: what they show.
        config: of the scan.

    Returns:
        What the index says of it: how many features there are, and how many are dead or rare.
    """
    scan, wanted = site.scan, site.wanted
    active = scan.active.sum(axis=1, dtype=np.int64)
    columns = {
        "feature": wanted.tolist(),
        "active": active[wanted].tolist(),
        "prompts": scan.prompts[wanted].tolist(),
        "peak": short(scan.peak[wanted]),
        "usual": short(scan.usual[wanted]),
        "label": [site.texts[name].text if (name := f"{site.name}/f{f}") in site.texts else "" for f in wanted],
    }
    if site.effects is not None:
        columns["effect"] = short(site.effects.strength[wanted])
    write_script(folder / "data" / folder_of(site.name) / "list.js", "list", site.name, columns)
    rows = max(1.0, float(tokens_of(config, site.name).sum()))
    flags = [flag_of(float(count), float(count) / rows) for count in active[wanted]]
    return {"pages": len(wanted), "dead": flags.count("dead"), "rare": flags.count("rare")}


def write_chunks(folder: Path, site: SitePages, config: Mapping[str, Any]) -> Iterator[int]:
    """Writes the chunks of a site, one after the other; yields how many of its features are written.

    Args:
        folder: of the pages.
        site: what they show.
        config: of the scan.
    """
    home = folder / "data" / folder_of(site.name)
    written = 0
    for chunk in np.unique(site.wanted // CHUNK):
        mine = site.wanted[site.wanted // CHUNK == chunk]
        records = {str(f): feature_record(site, config, int(f)) for f in mine}
        write_script(home / f"{chunk:04}.js", "features", site.name, int(chunk), records)
        if site.effects is not None:
            first = int(chunk) * CHUNK
            sheet = sheet_of(site.effects.picture[first : first + CHUNK], 8)
            save_picture(sheet, home / f"{chunk:04}.png")
        written += len(mine)
        yield written


def feature_record(site: SitePages, config: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns what a page shows of a feature, as JSON values.

    Args:
        site: of the feature.
        config: of the scan.
        number: of the feature.
    """
    scan, name = site.scan, f"{site.name}/f{number}"
    active = scan.active[number]
    record: dict[str, Any] = {
        "active": active.tolist(),
        "mean": short(scan.total[number] / np.maximum(active, 1)),
        "histogram": scan.histogram[number].tolist(),
        "prompts": int(scan.prompts[number]),
        "text": int(scan.text[number]),
        "peak": short(scan.peak[number]),
        "examples": list(_examples(site, config, number)),
        "up": _partners(site, site.links.upstream, number, config),
        "down": _partners(site, site.links.downstream, number, config),
        "near": _partners(site, site.links.neighbours, number, config),
    }
    if site.effects is not None:
        record["effect"] = short(site.effects.strength[number])
    if name in site.texts:
        text = site.texts[name]
        record["label"] = text.text
        record["detects"] = [[*row[:2], short(row[2]), *row[3:]] for row in text.rows]
    if name in site.edges:
        record["graph"] = {way: [[end, short(value)] for end, value in ends] for way, ends in site.edges[name].items()}
    return record


def _examples(site: SitePages, config: Mapping[str, Any], number: int) -> Iterator[list[Any]]:
    scan = site.scan
    streams = config["sites"][site.name]["streams"]
    for slot in np.flatnonzero(scan.example_prompt[number] >= 0):
        step, branch, side, position = place_of(config, site.name, int(scan.example_place[number, slot]))
        yield [
            int(scan.example_prompt[number, slot]),
            step,
            side or streams[0],
            position,
            short(scan.example_value[number, slot]),
            int(scan.example_tier[number, slot]),
            packed(site.maps[number, slot]),
            *([] if branch is None else [branch]),
        ]


def _partners(site: SitePages, strongest: Strongest, number: int, config: Mapping[str, Any]) -> list[list[Any]]:
    """Returns a feature's partners: number of the site, feature, weight or cosine, and what it is called, if known."""
    names, partners = list(config["sites"]), []
    for value, partner in zip(
        strongest.value[site.number, number], strongest.partner[site.number, number], strict=True
    ):
        at, feature = divmod(int(partner), config["features"])
        text = site.texts.get(f"{names[at]}/f{feature}")
        if value != 0:
            partners.append([at, feature, short(value), *([text.text] if text is not None else [])])
    return partners


def packed(cells: UInt8[np.ndarray, "cells"]) -> str:
    """Returns a map as text: `d` and all cells, or `s` and place and value of those that are not 0, in base64."""
    places = np.flatnonzero(cells)
    if 3 * len(places) >= len(cells):
        return "d" + base64.b64encode(cells.tobytes()).decode()
    triples = np.stack([places >> 8, places & 255, cells[places]], axis=1).astype(np.uint8)
    return "s" + base64.b64encode(triples.tobytes()).decode()


def short(value: Any) -> Any:
    """Returns numbers with four digits that count, which is what pages show."""
    if np.ndim(value):
        return [short(one) for one in value]
    return float(f"{float(value):.4g}")


def write_prompts(
    folder: Path, prompts: Sequence[tuple[int, str, Sequence[str], int]], thumbs: UInt8[np.ndarray, "chosen H W rgb"]
) -> None:
    """Writes the prompts that examples name, and their images.

    Args:
        folder: of the pages.
        prompts: number, text, tokens and seed of each, ascending.
        thumbs: of each.
    """
    chunks: dict[int, dict[str, Any]] = {}
    for place, (number, text, tokens, seed) in enumerate(prompts):
        record = {"text": text, "tokens": list(tokens), "seed": str(seed), "thumb": place}
        chunks.setdefault(number // CHUNK, {})[str(number)] = record
    for chunk, records in chunks.items():
        write_script(folder / "data" / "prompts" / f"{chunk:04}.js", "prompts", chunk, records)
    for number in range(0, len(thumbs), SHEET):
        sheet = sheet_of(np.asarray(thumbs[number : number + SHEET]), 4)
        save_picture(sheet, folder / "data" / "thumbs" / f"{number // SHEET:04}.{suffix_of(thumbs.shape[1:3])}")


def suffix_of(size: Sequence[int]) -> str:
    """Returns the kind of files that thumbnails are kept in."""
    return THUMB_KINDS[0] if max(size) > PHOTOGRAPH else THUMB_KINDS[1]


def sheet_of(pictures: UInt8[np.ndarray, "some H W rgb"], columns: int) -> UInt8[np.ndarray, "height width rgb"]:
    """Lays pictures out in `columns` rows of `columns`, what is left filled up with grey."""
    count, height, width, _ = pictures.shape
    rows = columns
    sheet = np.full((rows * columns, height, width, 3), 128, np.uint8)
    sheet[:count] = pictures
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def save_picture(picture: UInt8[np.ndarray, "height width rgb"], path: Path) -> None:
    """Writes a picture; it appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"format": "JPEG", "quality": 88} if path.suffix == ".jpg" else {"format": "PNG", "optimize": True}
    with atomic_file(path) as partial:
        Image.fromarray(picture).save(partial, **options)
