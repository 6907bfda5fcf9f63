"""The page of one feature as one HTML file: the folder's own script and style, and of its data what the page shows.

A folder of pages loads its data file by file; here they lie in the page, as JSON in which no text can end the script,
and pictures as `data:` addresses. A content security policy lets that script run alone, and nothing be fetched.
"""

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.dashboards.features.pages import ASSETS, CHUNK, SHEET, THUMB_KINDS, folder_of
from difffract_jax.dashboards.features.record import load_scan


def feature_page(directory: str | Path, feature: Feature) -> str:
    """Returns the page of a feature.

    Args:
        directory: that `difffract dashboards` wrote.
        feature: the feature; positions and steps are not read.

    Raises:
        UserError: if the directory holds no scan, is not whole, or has no page of the feature.
    """
    site = f"{feature.stream}/{feature.block}"
    load_scan(directory).site(site)
    try:
        return _of_feature(Path(directory), site, feature.feature)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"The data in {directory} are damaged; make the dashboards again.") from None


def _of_feature(directory: Path, site: str, number: int) -> str:
    """Returns the page of a feature of a site that was scanned."""
    folder, name = directory / "data", f"{site}/f{number}"
    (index,) = _call(folder / "index.js")
    _, columns = _call(folder / folder_of(site) / "list.js")
    if number not in columns["feature"]:
        raise UserError(f"{directory} has no page of {name}; scan it: `difffract dashboards ... --features {name}`.")
    chunk = number // CHUNK
    _, _, records = _call(folder / folder_of(site) / f"{chunk:04}.js")
    record, place = records[str(number)], columns["feature"].index(number)
    prompts = _prompts(folder, {one[0] for one in record["examples"]})
    if index["kind"] not in THUMB_KINDS:
        raise ValueError(f"thumbnails are {' or '.join(THUMB_KINDS)} files")
    sheets = {f"thumbs/{thumb // SHEET:04}.{index['kind']}" for thumb in (one["thumb"] for one in prompts.values())}
    sheets |= {f"{folder_of(site)}/{chunk:04}.png"} if "effect" in record else set()
    # Other features have no page here, so that the page does not link to them.
    index["sites"] = [one | {"pages": int(one["name"] == site)} for one in index["sites"]]
    nothing = {key: [] for key in columns}
    listed = {one["name"]: nothing for one in index["sites"]}
    listed[site] = {key: [column[place]] for key, column in columns.items()}
    calls = [("pictures", {f"data/{path}": _picture(folder / path) for path in sorted(sheets)})]
    calls += [("list", *item) for item in listed.items()]
    calls += [("features", site, chunk, {str(number): record})]
    for part in {prompt // CHUNK for prompt in prompts}:
        calls.append(("prompts", part, {str(n): one for n, one in prompts.items() if n // CHUNK == part}))
    calls += [("only", name), ("index", index)]
    return _page(name, calls)


def _call(path: Path) -> list[Any]:
    """Returns the arguments of the one call that a file of data is."""
    try:
        text = path.read_text(encoding="ascii")
        return json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged; make the dashboards again.") from None


def _prompts(folder: Path, numbers: set[int]) -> dict[int, dict[str, Any]]:
    """Returns the prompts of some numbers."""
    prompts: dict[int, dict[str, Any]] = {}
    for chunk in sorted({number // CHUNK for number in numbers}):
        _, records = _call(folder / "prompts" / f"{chunk:04}.js")
        prompts |= {int(number): record for number, record in records.items() if int(number) in numbers}
    return prompts


def _picture(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(f"{path} is missing; make the dashboards again.") from None
    kind = "jpeg" if path.suffix == ".jpg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _page(name: str, calls: list[Any]) -> str:
    """Returns the page that makes some calls of its script."""
    style, script, body = (
        (ASSETS / file).read_text(encoding="utf-8") for file in ("pages.css", "pages.js", "index.html")
    )
    made = (f"difffract.{call}({','.join(map(json.dumps, values))});" for call, *values in calls)
    script = f"{script}\n{chr(10).join(made)}".replace("</", "<\\/").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'"
    head, _, rest = body.partition('<link rel="stylesheet" href="pages.css">')
    inner, _, _ = rest.partition('<script src="pages.js"></script>')
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<link rel="icon" href="data:,">'
    head = head.replace("<title>Features</title>", f"{meta}\n<title>{html.escape(name)}</title>")
    return f"{head}<style>{style}</style>{inner}<script>{script}</script>\n</body>\n</html>\n"
