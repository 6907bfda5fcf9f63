"""Where the pages of features are, for the commands that name features: `features`, `trace`, `steer`, `study`, `view`.

1. `--pages DIR` names a folder that `difffract dashboards` wrote. It must hold pages of the transcoders in use.
2. Left out, the folder `dashboards` is taken, which that command writes unless told otherwise, if it is there and holds
   pages of these transcoders; else nothing is printed of pages.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from difffract_jax.config import UserError
from difffract_jax.dashboards.features.addresses import FeaturePages, open_pages

Pages = Annotated[
    Path | None,
    typer.Option(
        "--pages",
        help="Folder of feature pages that `difffract dashboards` wrote; the address of each named feature's page is "
        "printed. When left out, the folder `dashboards`, if it holds pages of these transcoders.",
        show_default=False,
    ),
]
AT_HAND = Path("dashboards")
"""Where `difffract dashboards` writes unless told otherwise."""
MOST_LISTED = 20
"""Pages that a terminal shows of a result that names many features."""
_FEATURE = re.compile(r"\b[a-z]+/\d+/f\d+")


def pages_at_hand(folder: Path | None, transcoders: str) -> FeaturePages | None:
    """Returns the feature pages to print addresses of; None if there are none.

    Args:
        folder: of --pages; None for those at hand.
        transcoders: content hash of the transcoders in use.

    Raises:
        UserError: if the folder that was named holds no pages of these transcoders.
    """
    if folder is not None:
        return open_pages(folder, transcoders)
    try:
        return open_pages(AT_HAND, transcoders)
    except UserError:
        return None


def with_pages(
    rows: Sequence[Mapping[str, Any]], pages: FeaturePages | None, column: str = "feature"
) -> list[dict[str, Any]]:
    """Returns rows of a table, each with the address of its feature's page; as they are if none has one.

    Args:
        rows: of a table.
        pages: from `pages_at_hand`.
        column: which names features, or nodes of a graph.
    """
    addresses = [pages.address(str(row[column])) if pages else "" for row in rows]
    if not any(addresses):
        return [dict(row) for row in rows]
    return [dict(row) | {"page": address or None} for row, address in zip(rows, addresses, strict=True)]


def page_table(names: Iterable[str], pages: FeaturePages | None, most: int | None = None) -> dict[str, Any]:
    """Returns a table of pages under "pages"; empty if there are none.

    Args:
        names: of features, in the order of the table; each is listed once.
        pages: from `pages_at_hand`.
        most: rows to list, and how many more there are; None for all.
    """
    features = dict.fromkeys(match[0] for name in names if (match := _FEATURE.match(name)))
    rows = [{"feature": name, "page": page} for name in features if pages and (page := pages.address(name))]
    if not rows:
        return {}
    more = len(rows) - (most or len(rows))
    return {"pages": rows[:most]} | ({"more pages": f"{more}; --json lists all"} if more > 0 else {})


def named_features(result: Any) -> list[str]:
    """Returns the features that a result names anywhere, in the order of their first occurrence.

    Args:
        result: JSON values.

    Example:
        >>> named_features({"table": [{"edit": "img/0/f4+img/1/f7@12=zero", "n": 3}]})
        ['img/0/f4', 'img/1/f7']
    """
    if isinstance(result, str):
        return list(dict.fromkeys(_FEATURE.findall(result)))
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    return list(dict.fromkeys(name for part in parts for name in named_features(part)))
