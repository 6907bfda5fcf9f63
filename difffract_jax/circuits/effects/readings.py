"""What scaling features does, in four readings from exact to real (docs/method.md, section 7).

    direct       the frozen map, every other source held
    propagated   the frozen map; features that are on in the trace stay on, with live values
    live         attention and norms frozen; features switch on and off as their activation says
    full         the real model: attention, norms and MLPs live, each edit adding what it changes

1. `scaled` runs one step with features scaled by a factor, in one of the readings.
2. `predict` says what a graph makes of it: changes travel along its edges, each step relative to the value of the node
   passed. On a graph of all active features and edges it is the propagated reading.
3. `node_effects` says the same of every node by itself, in one walk down the graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64

from difffract_jax.circuits.frozen.encoding import ReplacedSites, SiteLayers, site
from difffract_jax.circuits.frozen.replacement import Replacement
from difffract_jax.circuits.trace.record import RunOutputs
from difffract_jax.graphs.graph import FEATURE, Graph
from difffract_jax.graphs.order import levels
from difffract_jax.models.stacks import keep_mlp_in, per_group, run_stacks
from difffract_jax.models.streaming import Streamed, jit_resident
from difffract_jax.transcoders.transcoder import Transcoder

Mode = Literal["direct", "propagated", "live", "full"]
SWITCHED = ("propagated", "live")
"""Readings that differ in which features are on alone: one program computes either, as it is told when it runs."""


def scaled(prepared: Replacement, factors: Sequence[Array | np.ndarray], mode: Mode) -> RunOutputs:
    """Runs the recorded blocks with features scaled.

    Args:
        prepared: from `prepare_step`.
        factors: of every feature, at all replaced positions, [layer feat] per group; 1 leaves it.
        mode: the reading, see the module.

    Returns:
        The MLP sublayers' inputs, and the velocity if it is recorded.
    """
    with jax.default_matmul_precision("highest"):
        return _scaled(prepared, factors, mode)


@partial(jit_resident, static_argnames="mode")
def _scaled(prepared: Replacement, factors: Sequence[Array | np.ndarray], mode: Mode) -> RunOutputs:
    one_side = [jnp.asarray(factor)[:, None] for factor in factors]
    return edited(prepared, one_side, jax.tree.map(jnp.zeros_like, one_side), mode)


def edited(
    prepared: Replacement,
    factors: Sequence[Array],
    offsets: Sequence[Array],
    mode: Mode,
    *,
    switching: Array | None = None,
) -> RunOutputs:
    """Runs the recorded blocks with every feature's value z made factor * z + offset; for use inside other programs.

    Args:
        prepared: from `prepare_step`. Where the run starts is `prepared.sources.boundary`.
        factors: at all replaced positions, [layer side feat] per group. One side is all positions of the sequence; as
            many sides as the sequence holds streams are those of each.
        offsets: likewise, in units of z.
        mode: the reading, see the module.
        switching: where the reading is one of `SWITCHED`, whether it is `live`, so that one program serves both;
            if left out, `mode` says it.

    Returns:
        The MLP sublayers' inputs, and the velocity if it is recorded.
    """
    record, sites, sources = prepared
    assert switching is None or mode in SWITCHED
    live = mode == "full"
    parts = ([one.layers for one in sites], sources.values, sources.errors, factors, offsets, _fetchable(sites))
    h, kept = run_stacks(
        record.weights.live if live else record.weights.stacks,
        sources.boundary,
        record.cond,
        frozen=None if live else record.frozen,
        write=_WRITES[mode if switching is None else "either"],
        fixed=[
            _Site(None if one.streamed else one.stack, lengths, record.t, switching)
            for one, lengths in zip(sites, record.side_lengths, strict=True)
        ],
        layers=list(zip(*parts, strict=True)),
        tap=keep_mlp_in,
        unroll=False,
    )
    final = record.weights.final
    velocity = None if final is None else final(h.img, record.cond, None if live else record.inv_std)
    return RunOutputs(per_group(kept), velocity, record.latents)


@partial(jax.tree_util.register_dataclass, data_fields=["stack", "t", "switching"], meta_fields=["lengths"])
@dataclass(frozen=True)
class _Site:
    """What all MLP sublayers of a group share: transcoders, unless they are streamed; tokens of each stream; time;
    and whether features switch on and off, where that is told when the program runs."""

    stack: Transcoder | None
    lengths: tuple[int, ...]
    t: Float[Array, ""]
    switching: Bool[Array, ""] | None


def _fetchable(sites: Sequence[ReplacedSites]) -> list[Streamed | None]:
    """Returns the streamed transcoder of every block, per group; nothing is fetched for a block that has none."""
    return [None if one.streamed is None else one.streamed.pick(one.used_slots) for one in sites]


def _write(
    fixed: _Site,
    layer: tuple[SiteLayers, Array, Array, Array, Array, Transcoder | None],
    x: Float[Array, "rows d_model"],
    true: Callable[[], Array],
    *,
    mode: Literal[Mode, "either"],
) -> tuple[Float[Array, "rows d_model"], None]:
    """Returns what one MLP sublayer adds, with its features edited."""
    stack, (at, values, error, factor, offset, fetched) = fixed.stack, layer
    if stack is None and fetched is None:
        return (true() if mode == "full" else error), None
    transcoder = site(stack, at.slot) if fetched is None else fetched
    factor, offset = (by_side(per_side, fixed.lengths) for per_side in (factor, offset))
    rows = jnp.arange(x.shape[0])[:, None]
    recorded = jnp.zeros((x.shape[0], transcoder.config.features), x.dtype).at[rows, at.index].add(values)
    if mode == "full":
        change = (factor - 1) * transcoder.encode(x, fixed.t) + offset
        return true() + jnp.where(at.live[:, None], change @ transcoder.dec.kernel[...], 0), None
    if mode == "direct":
        z = recorded
    elif mode == "live":
        z = transcoder.encode(x, fixed.t)
    else:
        u = transcoder.preactivation(x, fixed.t)
        z = jnp.where(recorded > 0, u, 0)
        z = z if mode == "propagated" else jnp.where(fixed.switching, transcoder.activate(u), z)
    return error + jnp.where(at.live[:, None], transcoder.decode(factor * z + offset, x), 0), None


_WRITES = {mode: partial(_write, mode=mode) for mode in (*get_args(Mode), "either")}
"""What stands in for MLP sublayers, by the reading; `either` of `SWITCHED`."""


def by_side(per_side: Float[Array, "side feat"], lengths: tuple[int, ...]) -> Float[Array, "row feat"]:
    """Returns what holds at each row of a sequence.

    Args:
        per_side: one row for all positions, or one for each stream of the sequence.
        lengths: tokens of each stream that the sequence holds, in order.
    """
    if per_side.shape[0] == 1:
        return jnp.broadcast_to(per_side, (sum(lengths), per_side.shape[1]))
    return jnp.repeat(per_side, np.array(lengths), axis=0, total_repeat_length=sum(lengths))


def factors_for(
    prepared: Replacement, graph: Graph, nodes: np.ndarray, factor: float
) -> tuple[Float[Array, "layer feat"], ...]:
    """Returns the factors that scale some feature nodes of a graph of one step, at every position, per group.

    Args:
        prepared: replacement of the step.
        graph: whose `node_block` and `node_stream` say where the features lie.
        nodes: of the graph.
        factor: for each. Where a sequence holds several streams, it acts on the positions of all.

    Raises:
        ValueError: if a node is not a feature.
    """
    info = graph.provenance.traced_run
    if np.any(graph.node_kind[nodes] != FEATURE):
        raise ValueError("Only features can be scaled, but a node is none.")
    groups = info.layout.groups_at(graph.node_block, graph.node_stream)
    made = []
    for group, (sites, like) in enumerate(zip(prepared.sites, prepared.sources.errors, strict=True)):
        first = info.recorded[0] + prepared.record.first_layers[group]
        made.append(np.ones((like.shape[0], sites.features), like.dtype))
        for node in nodes[groups[nodes] == group]:
            made[-1][graph.node_block[node] - first, graph.node_feature[node]] = factor
    return tuple(jnp.asarray(one) for one in made)


def predict(graph: Graph, factors: Float64[np.ndarray, "node"]) -> Float64[np.ndarray, "target"]:
    """Returns by how much scaling features moves the graph's targets, along its edges.

    Args:
        graph: position by position.
        factors: of every node's value; 1 leaves it to follow what drives it.
    """
    level = levels(graph.node_step, graph.node_block)
    moved = np.zeros(graph.node_kind.size)  # of u, or of an output's value
    share = factors - 1  # of the node's value: what it is scaled by, and what drives it
    order = np.argsort(level[graph.edge_target], kind="stable")
    source, target = graph.edge_source[order], graph.edge_target[order]
    attribution = graph.edge_attribution[order].astype(np.float64)
    bounds = np.searchsorted(level[target], np.unique(level[target]))
    for begin, end in zip(bounds, [*bounds[1:], target.size], strict=True):
        part = slice(begin, end)
        np.add.at(moved, target[part], attribution[part] * share[source[part]])
        here = np.unique(target[part])
        here = here[graph.node_kind[here] == FEATURE]
        share[here] = factors[here] * (1 + moved[here] / graph.node_value[here]) - 1
    return moved[graph.targets]


def node_effects(graph: Graph) -> Float64[np.ndarray, "node"]:
    """Returns what every node adds to the graph's weighted targets, along all paths and with their signs.

    Zeroing a feature moves the targets by minus its effect, as `predict` says for that feature alone: at every feature
    passed, a path goes on with the share of its value that it makes up. An input's or error's effect is what it adds.

    Args:
        graph: position by position.
    """
    level = levels(graph.node_step, graph.node_block)
    order = np.argsort(-level[graph.edge_target], kind="stable")
    source, target = graph.edge_source[order], graph.edge_target[order]
    attribution = graph.edge_attribution[order].astype(np.float64)
    found, roots = np.zeros(graph.node_kind.size), graph.root_weights
    passed = (graph.node_kind == FEATURE) & (graph.node_value != 0)
    value = np.where(passed, graph.node_value, 1.0)
    changes = np.flatnonzero(np.diff(level[target], prepend=np.iinfo(np.int64).max))
    for begin, end in pairwise(np.append(changes, source.size)):
        part = slice(begin, end)
        # Everything above this level is done, hence what its nodes add is final.
        weight = roots[target[part]] + np.where(passed[target[part]], found[target[part]] / value[target[part]], 0)
        found += np.bincount(source[part], attribution[part] * weight, found.size)
    return found
