"""Addresses of feature pages in a folder that `difffract dashboards` wrote: DIR/index.html#img/1/f159.

A folder may hold pages of some features alone. Which they are stands in the list of each site, which is read when one
of its features is asked for.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from difffract_jax.config import UserError
from difffract_jax.dashboards.features.record import Scan, load_scan
from difffract_jax.display import hash_text
from difffract_jax.storage.remote.cache import refuse_remote

INDEX = "index.html"
_NAME = re.compile(r"(?P<site>\w+/\d+)/f(?P<number>\d+)(?!\w)")


@dataclass(frozen=True)
class FeaturePages:
    """A folder of feature pages.

    Attributes:
        folder: that `difffract dashboards` wrote.
        scan: what its pages show.
    """

    folder: Path
    scan: Scan
    _listed: dict[str, frozenset[int]] = field(default_factory=dict, repr=False)

    def address(self, name: str) -> str:
        """Returns the address of a feature's page, as a path from where the folder was named; "" if there is none.

        Args:
            name: of the feature, img/1/f159; a position and a step, as in img/1/f159@13#1, are not read. Names of
                other nodes have no page.

        Raises:
            UserError: if the list of its site cannot be read.
        """
        match = _NAME.match(name)
        if match is None or match["site"] not in self.scan.sites:
            return ""
        if match["site"] not in self._listed:
            self._listed[match["site"]] = frozenset(_listed_features(self.folder, match["site"]))
        return f"{self.folder / INDEX}#{match[0]}" if int(match["number"]) in self._listed[match["site"]] else ""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns those of some features that have no page, sorted; arguments and errors as for `address`."""
        return sorted(name for name in {*names} if not self.address(name))


def open_pages(folder: Path, transcoders: str | None = None) -> FeaturePages:
    """Opens a folder of feature pages.

    Args:
        folder: that `difffract dashboards` wrote.
        transcoders: content hash of those whose features are asked for; None where it is not known.

    Raises:
        UserError: if it is no such folder, or holds pages of other transcoders.
    """
    refuse_remote(folder, "The folder of feature pages")
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {INDEX}; give the folder that `difffract dashboards` wrote.")
    scan = load_scan(folder)
    theirs = str(scan.config.get("transcoders"))
    if transcoders is not None and theirs != transcoders:
        raise UserError(
            f"{folder} holds pages of other transcoders ({hash_text(theirs)}) than those in use "
            f"({hash_text(transcoders)}); make pages of these with `difffract dashboards`, or leave --pages out."
        )
    return FeaturePages(folder, scan)


def _listed_features(folder: Path, site: str) -> list[int]:
    """Returns the features of a site that have a page; `pages.write_list` writes them."""
    path = folder / "data" / site.replace("/", "-") / "list.js"
    try:
        text = path.read_text(encoding="ascii")
        _, columns = json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")
        return [int(number) for number in columns["feature"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read; make the pages again with `difffract dashboards`.") from None
