"""Edits of groups by their names, as the viewer saved them, for `steer`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from difffract_jax.circuits.notation.edits import Edit, Supernode
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.cli.settings import SteerConfig
from difffract_jax.config import UserError
from difffract_jax.graphs.files.viewer_groups import read_any_groups
from difffract_jax.graphs.groups import Groups

_FEATURE = re.compile(r"[a-z]+/\d+/f\d+(#\d+)?")


def edits_of(settings: SteerConfig) -> tuple[list[Edit], Groups | None]:
    """Returns the edits, those of groups by name included, and the groups; None if there are none."""
    if settings.groups is None:
        return [Edit.parse(text) for text in settings.edit], None
    groups = read_any_groups(settings.groups)
    return [_edit_of(text, groups, settings.groups) for text in settings.edit], groups


def _edit_of(text: str, groups: Groups, path: Path) -> Edit:
    """Reads an edit, which may be of a group by its name."""
    name, _, how = text.strip().rpartition("=")
    if name.strip() not in groups.groups:
        try:
            return Edit.parse(text)
        except UserError as error:
            raise UserError(f"{error} {path} has the groups {', '.join(map(repr, groups.groups)) or 'none'}.") from None
    features = group_features(groups.groups[name.strip()])
    if not features:
        raise UserError(f"The group {name.strip()!r} of {path} holds no feature, and nothing else can be edited.")
    asked = Edit.parse(f"{features[0]}={how}")  # what is done to it, and whether that can be done
    return replace(asked, feature=Supernode(name.strip(), features))


def group_features(members: Sequence[str]) -> tuple[Feature, ...]:
    """Returns the features among the nodes of a group, without positions; steps of a graph over several stay.

    Args:
        members: names of nodes, img/3/f401, img/3/f401#1, single/0/f7@img, img/3/f401@12, error img/2.
    """
    names = [re.sub(r"@(img|txt)?\d*(?=#|$)", "", name) for name in members if not name.endswith("(target)")]
    return tuple(dict.fromkeys(Feature.parse(name) for name in names if _FEATURE.fullmatch(name)))


def check_groups(groups: Groups, model: str, transcoders: str, settings: SteerConfig) -> None:
    """Refuses groups of a graph of another model or other transcoders, whose features are others."""
    for what, ours, theirs in (
        ("model", model, groups.graph.model),
        ("set of transcoders", transcoders, groups.graph.transcoders),
    ):
        if theirs is not None and ours != theirs:
            raise UserError(
                f"{settings.groups} holds groups of a graph of another {what} ({theirs[:12]}..., but the one given is "
                f"{ours[:12]}...); give the {what} that the graph was traced with."
            )
