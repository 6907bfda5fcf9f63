"""Which MLP sublayers have a transcoder: sites by name, in the order in which they are stacked.

A site is written LABEL/N, as in img/3, txt/3 (double-stream blocks) or single/5 (single-stream blocks); see `address`.
Sites of a group have the same tokens and form one stack, ascending; a stack over all sites holds the groups in the
model's order.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from difffract_jax.address import GROUPS, Group, Layout
from difffract_jax.config import UserError, nearest

ROWS = Group("rows", "rows", ())
"""The one site, rows/0, of rows that come from no model of this package."""
KNOWN_GROUPS = (*GROUPS, ROWS)
"""Groups that transcoders may be of: FLUX's, and that of foreign rows."""
_LAYERS = re.compile(r"\*|\d+(-\d+)?")
_PATTERN = re.compile(r"(\w+|\*)/(\*|\d+(?:-\d+)?)")


class SiteSet(NamedTuple):
    """Sites with a transcoder.

    Attributes:
        members: the groups that have any, in the model's order, each with its sites' numbers, ascending.
    """

    members: tuple[tuple[Group, tuple[int, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Every site's name, in the order of the stack."""
        return tuple(f"{group.label}/{number}" for group, numbers in self.members for number in numbers)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Name of a group -> its sites' numbers."""
        return {group.name: numbers for group, numbers in self.members}

    @property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """Label, as addresses have it -> the sites' numbers."""
        return {group.label: numbers for group, numbers in self.members}

    @property
    def slices(self) -> dict[str, slice]:
        """Name of a group -> where its sites lie in a stack over all."""
        places, start = {}, 0
        for name, numbers in self.groups.items():
            places[name] = slice(start, start + len(numbers))
            start += len(numbers)
        return places

    def to_json(self) -> dict[str, list[int]]:
        """Returns the same as JSON values, also of groups that have none; `sites_of` reads them."""
        return {group.name: [] for group in GROUPS} | {name: list(numbers) for name, numbers in self.groups.items()}

    def foreign_groups(self) -> dict[str, dict[str, Any]]:
        """Returns as JSON values what `sites_in` must be told of groups that this package's models do not have."""
        groups = (group for group, _ in self.members if group not in KNOWN_GROUPS)
        return {group.name: {"label": group.label, "streams": list(group.streams)} for group in groups}

    def slots(self, layout: Layout) -> tuple[dict[int, int], ...]:
        """Returns, per group of a model, which of its blocks have a transcoder, and the place of each in its stack.

        Args:
            layout: of the model.
        """
        found = []
        for number, group in enumerate(layout.groups):
            numbers, blocks = self.groups.get(group.name, ()), layout.labels[group.label]
            placed = {blocks[site]: place for place, site in enumerate(numbers) if site < len(blocks)}
            found.append({block: place for block, place in placed.items() if block in layout.blocks_of(number)})
        return tuple(found)


def sites_of(numbers: Mapping[str, Sequence[int]], groups: Sequence[Group] = KNOWN_GROUPS) -> SiteSet:
    """Returns the sites of these numbers.

    Args:
        numbers: name of a group -> its sites' numbers; none for a group that is left out.
        groups: that there are, in the model's order; FLUX's, and that of foreign rows, if left out.

    Raises:
        UserError: if there is no such group.
    """
    known = {group.name: group for group in groups}
    unknown = sorted(set(numbers) - set(known))
    if unknown:
        raise UserError(f"There are no sites called {unknown[0]!r}; the model has {', '.join(known)}.")
    members = ((group, tuple(sorted(numbers.get(name, ())))) for name, group in known.items())
    return SiteSet(tuple((group, each) for group, each in members if each))


def sites_in(record: Mapping[str, Any], key: str = "layers") -> SiteSet:
    """Reads the sites that a file names.

    Args:
        record: holds them, as `SiteSet.to_json` has them; and under `groups`, where there are such, those of a model of
            one's own, as `SiteSet.foreign_groups` has them.
        key: under which.

    Raises:
        UserError: if there is no such group.
    """
    own = record.get("groups", {}).items()
    groups = tuple(Group(name, entry["label"], tuple(entry["streams"])) for name, entry in own)
    return sites_of(record[key], (*KNOWN_GROUPS, *(group for group in groups if group not in GROUPS)))


def layer_patterns(layers: str | None, streams: str | None) -> tuple[str, ...]:
    """Returns sites in short: the blocks of some streams, for `parse_sites`.

    Args:
        layers: numbers of blocks and ranges of them, as in 6,12,18 or 0-5; all if left out.
        streams: labels of sites, as in img,txt; if left out, those that work on one stream, as double-stream blocks do.

    Raises:
        UserError: if either is of another form.

    Example:
        >>> layer_patterns("6,12-13", None)
        ('img/6', 'img/12-13', 'txt/6', 'txt/12-13')
    """
    known = [group.label for group in GROUPS]
    labels = [group.label for group in GROUPS if len(group.streams) == 1]
    if streams is not None:
        labels = [part.strip() for part in streams.split(",")]
    blocks = ["*"] if layers is None else [part.strip() for part in layers.split(",")]
    for label in labels:
        if label not in known:
            raise UserError(f"`--streams {streams}` names no streams: `{label}` is not one{nearest(label, known)}")
    if not all(map(_LAYERS.fullmatch, blocks)):
        raise UserError(f"`--layers {layers}` names no blocks; write their numbers, as in 6,12,18 or 0-5.")
    return tuple(f"{label}/{block}" for label in labels for block in blocks)


def parse_sites(patterns: Sequence[str], layout: Layout) -> SiteSet:
    """Reads which sites are meant.

    Args:
        patterns: `img/3`, `txt/0-5`, `single/*`, `*/*` and the like.
        layout: of the model.

    Raises:
        UserError: if a pattern is of another form, or names a block that the model does not have.
    """
    depths = {label: len(blocks) for label, blocks in layout.labels.items()}
    chosen: dict[str, set[int]] = {label: set() for label in depths}
    for pattern in patterns:
        match = _PATTERN.fullmatch(pattern)
        if match is None or match[1] not in (*depths, "*"):
            raise UserError(
                f"{pattern!r} names no sites; write STREAM/BLOCKS with a stream {', '.join(depths)} or *, as in img/3, "
                "txt/0-5, single/* or */*."
            )
        for label in depths if match[1] == "*" else (match[1],):
            first, _, last = match[2].partition("-")
            numbers = range(depths[label]) if first == "*" else range(int(first), int(last or first) + 1)
            beyond = [number for number in numbers if number >= depths[label]]
            if beyond and match[1] != "*":
                layout.block_of(label, beyond[0])
            chosen[label].update(number for number in numbers if number < depths[label])
    if not any(chosen.values()):
        raise UserError(f"The sites {', '.join(patterns) or '(none)'} name no block of this model; write */* for all.")
    return sites_of({group.name: tuple(chosen[group.label]) for group in layout.groups}, layout.groups)


def is_chosen(patterns: Sequence[str], label: str, number: int) -> bool:
    """Says whether a site is among those meant, without knowing how many blocks the model has.

    Args:
        patterns: as for `parse_sites`.
        label: of the site's group, as in img.
        number: of the site.

    Raises:
        UserError: if a pattern is of another form.

    Example:
        >>> is_chosen(["img/0-3", "txt/*"], "img", 4), is_chosen(["img/0-3", "txt/*"], "txt", 4)
        (False, True)
    """
    meant = False
    for pattern in patterns:
        match = _PATTERN.fullmatch(pattern)
        if match is None:
            raise UserError(f"{pattern!r} names no sites; write STREAM/BLOCKS, as in img/3, txt/0-5, single/* or */*.")
        first, _, last = match[2].partition("-")
        inside = first == "*" or int(first) <= number <= int(last or first)
        meant = meant or (match[1] in ("*", label) and inside)
    return meant


def are_chosen(patterns: Sequence[str], held: Sequence[tuple[str, int]], where: str) -> list[bool]:
    """Says for each site that there is whether it is among those meant.

    Args:
        patterns: as for `parse_sites`.
        held: label and number of each site that there is.
        where: what holds them, for the message.

    Raises:
        UserError: if a pattern is of another form, or means none of them.

    Example:
        >>> are_chosen(["img/0-3"], [("img", 2), ("img", 5)], "a set")
        [True, False]
    """
    for pattern in patterns:
        if not any(is_chosen([pattern], *site) for site in held):
            names = ", ".join(f"{label}/{number}" for label, number in sorted(set(held)))
            raise UserError(f"{where} holds none of the sites {pattern}; it has {names}.")
    return [is_chosen(patterns, *site) for site in held]


def some_sites(held: SiteSet, patterns: Sequence[str], where: str) -> tuple[SiteSet, dict[str, list[int]]]:
    """Returns those of a set's sites that are meant, and the places of each group's in its stack.

    Args:
        held: the set's sites.
        patterns: as for `parse_sites`.
        where: what holds them, for the message.

    Raises:
        UserError: if a pattern is of another form, or means none of them.

    Example:
        >>> some_sites(sites_of({"img": (0, 2, 5)}), ["img/2-9"], "a set")[1]
        {'img': [1, 2]}
    """
    chosen = are_chosen(patterns, [(group.label, n) for group, numbers in held.members for n in numbers], where)
    kept = {name: [place for place, wanted in enumerate(chosen[at]) if wanted] for name, at in held.slices.items()}
    places = {name: each for name, each in kept.items() if each}
    numbers = {name: [held.groups[name][place] for place in each] for name, each in places.items()}
    return sites_of(numbers, tuple(group for group, _ in held.members)), places
