"""Transcoders of the sites that a command uses, and no others: one of FLUX's takes 1.2 GB.

1. A feature is explained by blocks up to its own: `up_to_targets`. A graph's run is captured anew for the sites of the
   blocks that it names: `of_graph`. `steer` reads the sites that it edits: `edited`.
2. `load_used` reads these alone of a directory that this package wrote. What it returns is still known by the whole
   set's content hash, since the numbers are the same as with all sites.
3. Where sites are asked for that there are not, all are loaded, so that what is told of them is the same as ever.
"""

from collections.abc import Callable, Sequence
from typing import Any

from difffract_jax.address import Layout
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.cli.models import dtype_named
from difffract_jax.directories import transcoder_directory
from difffract_jax.loading import load_transcoders
from difffract_jax.storage.checkpoint import read_config
from difffract_jax.transcoders.sites import is_chosen, sites_in
from difffract_jax.transcoders.transcoder import TranscoderSet

Wanted = Callable[[str, int], bool]
"""Says of a site, by label and number, whether it is used."""


def load_used(transcoders: str, wanted: Wanted | None, *, sites: str | None = None, **options: Any) -> TranscoderSet:
    """Loads the transcoders of the sites that are used.

    Args:
        transcoders: as `load_transcoders` takes it.
        wanted: which are; None for all.
        sites: those that were asked for, as in img/0-3,txt/*, which are then loaded and known by their own hash.
        options: of `load_transcoders`.
    """
    if sites is not None:
        return load_transcoders(transcoders, sites=sites.split(","), **options)
    directory = None if wanted is None else transcoder_directory(transcoders).path
    if directory is None or wanted is None or not (directory / "config.json").is_file():
        return load_transcoders(transcoders, **options)
    record = read_config(directory)
    if record.get("kind") != "transcoders":
        return load_transcoders(transcoders, **options)
    held = [(group.label, number) for group, numbers in sites_in(record).members for number in numbers]
    used = [f"{label}/{number}" for label, number in held if wanted(label, number)]
    if not used or len(used) == len(held):
        return load_transcoders(transcoders, **options)
    return load_transcoders(transcoders, sites=used, **options)._replace(source=record["content_hash"])


def load_for_graph(transcoders: str, layout: Layout, graph: Any, **options: Any) -> TranscoderSet:
    """Loads the transcoders that a graph's run is captured anew with: those of `trace --sites`, or of its blocks.

    Args:
        transcoders: as `load_transcoders` takes it.
        layout: of the model.
        graph: the graph.
        options: of `load_transcoders`.
    """
    chosen = (graph.provenance.settings or {}).get("sites")
    options["dtype"] = dtype_named(traced_types(graph).get("transcoder_dtype", "f32"))
    if isinstance(chosen, str):
        return load_transcoders(transcoders, sites=chosen.split(","), **options)
    return load_used(transcoders, of_graph(layout, graph), **options)


def traced_types(graph: Any) -> dict[str, str]:
    """Returns the types of weights that a graph was traced with, by the names of `PlanConfig`.

    Without `dtype` the model's is that of its files, which a trace takes unless told otherwise. A graph that no command
    made was traced with what `load_pipeline` and `load_transcoders` give, as far as one can know.

    Args:
        graph: the graph.
    """
    traced = graph.provenance.settings
    named = {"dtype": "f32"} if traced is None else {"dtype": traced.get("model_dtype")}
    named["transcoder_dtype"] = (traced or {}).get("transcoder_dtype")
    return {name: kind for name, kind in named.items() if kind in ("f32", "bf16")}


def up_to_targets(layout: Layout, targets: Sequence[Any], steps: tuple[int, int]) -> Wanted | None:
    """Returns which sites can bear on the targets of a trace: those up to the last feature's block.

    Args:
        layout: of the model.
        targets: features, or outputs, on which all sites bear.
        steps: first and last step; over several, all sites of the earlier ones bear on the last.
    """
    features = [one for one in targets if isinstance(one, Feature)]
    if steps[0] != steps[1] or len(features) < len(targets):
        return None
    return _up_to(layout, [(one.stream, one.block) for one in features])


def of_graph(layout: Layout, graph: Any) -> Wanted | None:
    """Returns which sites a graph's run is captured for, as `up_to_targets` does for its trace.

    Args:
        layout: of the model.
        graph: position by position.
    """
    from difffract_jax.graphs.graph import FEATURE, OUTPUT

    if len(graph.provenance.steps or ()) != 1 or bool((graph.node_kind == OUTPUT).any()):
        return None
    blocks = graph.node_block[graph.node_kind == FEATURE]
    if not blocks.size:
        return None
    last = int(blocks.max())
    return lambda label, number: _block(layout, label, number) <= last


def edited(edits: Sequence[Edit]) -> Wanted:
    """Returns which sites some edits name."""
    parts = [(part.stream, part.block) for edit in edits for part in edit.parts]
    return lambda label, number: any(label == stream and block in (None, number) for stream, block in parts)


def matching(patterns: Sequence[str]) -> Wanted:
    """Returns which sites some patterns mean, as in img/0-3."""
    return lambda label, number: is_chosen(patterns, label, number)


def _up_to(layout: Layout, sites: Sequence[tuple[str, int]]) -> Wanted | None:
    """Returns the sites up to the highest block of some; None if one is not of the model, which is told later."""
    blocks = [_block(layout, label, number) for label, number in sites]
    if layout.depth in blocks:
        return None
    return lambda label, number: _block(layout, label, number) <= max(blocks)


def _block(layout: Layout, label: str, number: int) -> int:
    """Returns a site's block; one behind the last for a site that the model does not have."""
    blocks = layout.labels.get(label, ())
    return blocks[number] if 0 <= number < len(blocks) else layout.depth
