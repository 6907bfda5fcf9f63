"""Edits of groups by their names, as a viewer saved them, for `steer`."""

from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.group_edits import group_edit
from difffract_jax.cli.settings import SteerConfig
from difffract_jax.config import UserError
from difffract_jax.graphs.files.viewer_groups import read_any_groups
from difffract_jax.graphs.groups import Groups


def edits_of(settings: SteerConfig) -> tuple[list[Edit], Groups | None]:
    """Returns the edits, those of groups by name included, and the groups; None if there are none."""
    if settings.groups is None:
        return [Edit.parse(text) for text in settings.edit], None
    groups = read_any_groups(settings.groups)
    return [group_edit(text, groups, str(settings.groups)) for text in settings.edit], groups


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
