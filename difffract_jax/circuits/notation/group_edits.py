"""Edits of groups by their names, as a .groups.json or a page in a notebook has them."""

import re
from collections.abc import Sequence
from dataclasses import replace

from difffract_jax.circuits.notation.edits import Edit, Supernode
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.graphs.groups import Groups

_FEATURE = re.compile(r"[a-z]+/\d+/f\d+(#\d+)?(~\w+)?")


def group_edit(text: str, groups: Groups, source: str = "`groups`") -> Edit:
    """Reads an edit, which may be of a group by its name, as in "the circle=zero".

    Args:
        text: the edit: a group, or what `Edit.parse` reads, and after the last = what to do.
        groups: of a graph.
        source: where they come from, for messages.

    Raises:
        UserError: if it is neither, or the group holds no feature.
    """
    name, _, how = text.strip().rpartition("=")
    if name.strip() not in groups.groups:
        try:
            return Edit.parse(text)
        except UserError as error:
            raise UserError(
                f"{error} {source} has the groups {', '.join(map(repr, groups.groups)) or 'none'}."
            ) from None
    features = group_features(groups.groups[name.strip()])
    if not features:
        raise UserError(f"The group {name.strip()!r} of {source} holds no feature, and nothing else can be edited.")
    asked = Edit.parse(f"{features[0]}={how}")  # what is done to it, and whether that can be done
    return replace(asked, feature=Supernode(name.strip(), features))


def group_features(members: Sequence[str]) -> tuple[Feature, ...]:
    """Returns the features among the nodes of a group, without positions; steps of a graph over several stay.

    Args:
        members: names of nodes, img/3/f401, img/3/f401#1~negative, single/0/f7@img, img/3/f401@12, error img/2.
    """
    names = [re.sub(r"@(img|txt)?\d*(?=[#~]|$)", "", name) for name in members if not name.endswith("(target)")]
    return tuple(dict.fromkeys(Feature.parse(name) for name in names if _FEATURE.fullmatch(name)))
