"""What scaling features does, in four readings from exact to real (METHOD section 7).

    direct       the frozen map, every other source held
    propagated   the frozen map; features that are on in the trace stay on, with live values
    live         attention and norms frozen; features switch on and off as their activation says
    full         the real model: attention, norms and MLPs live, each edit adding what it changes

1. `scaled` runs one step with features scaled by a factor, in one of the readings.
2. `predict` says what a graph makes of it: changes travel along its edges, each step relative to the value of the node
   passed. On a graph of all active features and edges it is the propagated reading.
3. `effects` says the same of every node by itself, in one walk down the graph.
"""

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from difffract_jax.circuits.graph import FEATURE, Graph
from difffract_jax.circuits.influence import levels
from difffract_jax.circuits.record import Reading
from difffract_jax.circuits.replacement import Replacement, Sites, site
from difffract_jax.models.blocks import DoubleBlock, Groups, SingleBlock, Streams, both, join, run_mlp, run_mlps, split

Mode = Literal["direct", "propagated", "live", "full"]


def scaled(prepared: Replacement, factors: Groups, mode: Mode) -> Reading:
    """Runs the recorded blocks with features scaled.

    Args:
        prepared: from `prepare`.
        factors: of every feature, at all replaced positions, [layer feat] per group; 1 leaves it.
        mode: the reading, see the module.

    Returns:
        The MLP sublayers' inputs, and the velocity if it is recorded.
    """
    with jax.default_matmul_precision("highest"):
        return _scaled(prepared, factors, mode)


@partial(jax.jit, static_argnames="mode")
def _scaled(prepared: Replacement, factors: Groups, mode: Mode) -> Reading:
    one_side = jax.tree.map(lambda factor: factor[:, None], factors)
    return edited(prepared, one_side, jax.tree.map(jnp.zeros_like, one_side), mode)


def edited(prepared: Replacement, factors: Groups, offsets: Groups, mode: Mode) -> Reading:
    """Runs the recorded blocks with every feature's value z made factor * z + offset; for use inside other programs.

    Args:
        prepared: from `prepare`. Where the run starts is `prepared.sources.boundary`.
        factors: at all replaced positions, [layer side feat] per group. In single-stream blocks two sides are the text
            and the image positions; one side is all positions.
        offsets: likewise, in units of z.
        mode: the reading, see the module.

    Returns:
        The MLP sublayers' inputs, and the velocity if it is recorded.
    """
    record, sites, sources = prepared
    live, text_tokens = mode == "full", sources.boundary.txt.shape[0]
    write = partial(_write, t=record.t, mode=mode, text_tokens=text_tokens)

    def step(h: Streams, layer: Any) -> tuple[Streams, Streams]:
        block, frozen, *parts = layer

        def mlp(block: DoubleBlock, x: Streams) -> Streams:
            true = run_mlps(block, x) if live else x
            stacks = Streams(sites.img.stack, sites.txt.stack)
            return both(write, stacks, *parts, x, true)

        h, acts = block(h, record.cond, frozen=None if live else frozen, mlp=mlp)
        return h, acts.mlp_in

    def step_single(h: Array, layer: Any) -> tuple[Array, Array]:
        block, frozen, at, values, error, factor, offset = layer

        def mlp(block: SingleBlock, x: Array) -> Array:
            true = run_mlp(block, x) if live else x
            return write(sites.joint.stack, at, values, error, factor, offset, x, true)

        h, acts = block(h, record.cond, frozen=None if live else frozen, mlp=mlp)
        return h, acts.mlp_in

    parts = (both(lambda s: s.layers, sites), sources.values, sources.errors, factors, offsets)
    pairs = (Streams(part.img, part.txt) for part in parts)
    h, x = jax.lax.scan(step, sources.boundary, (record.weights.double, record.frozen, *pairs))
    last = (sites.joint.layers, *(part.joint for part in (sources.values, sources.errors, factors, offsets)))
    joint, joint_x = jax.lax.scan(step_single, join(h), (record.weights.single, record.frozen_single, *last))
    velocity = None
    if record.weights.final is not None:
        rows = split(joint, text_tokens).img
        velocity = record.weights.final(rows, record.cond, None if live else record.inv_std)
    return Reading(Groups(x.img, x.txt, joint_x), velocity, record.latents)


def _write(
    stack: Any,
    at: Any,
    values: Array,
    error: Array,
    factor: Array,
    offset: Array,
    x: Array,
    true: Array,
    *,
    t: Array,
    mode: Mode,
    text_tokens: int,
) -> Float[Array, "rows d_model"]:
    """Returns what one MLP sublayer adds, with its features edited."""
    if stack is None:
        return true if mode == "full" else error
    transcoder = site(stack, at.slot)
    factor, offset = (by_side(per_side, x.shape[0], text_tokens) for per_side in (factor, offset))
    rows = jnp.arange(x.shape[0])[:, None]
    recorded = jnp.zeros((x.shape[0], stack.config.features), x.dtype).at[rows, at.index].add(values)
    if mode == "full":
        change = (factor - 1) * transcoder.encode(x, t) + offset
        return true + jnp.where(at.live[:, None], change @ transcoder.dec.kernel[...], 0)
    if mode == "direct":
        z = recorded
    elif mode == "propagated":
        z = jnp.where(recorded > 0, transcoder.preactivation(x, t), 0)
    else:
        z = transcoder.encode(x, t)
    return error + jnp.where(at.live[:, None], transcoder.decode(factor * z + offset, x), 0)


def by_side(per_side: Float[Array, "side feat"], rows: int, text_tokens: int) -> Float[Array, "row feat"]:
    """Returns what holds at each position: of the text first, then of the image, or the same at all if it is one.

    Args:
        per_side: one row for all positions, or one for the text and one for the image.
        rows: positions of the sequence.
        text_tokens: how many of them, at the beginning, are text, where there are two sides.
    """
    if per_side.shape[0] == 1:
        return jnp.broadcast_to(per_side, (rows, per_side.shape[1]))
    return jnp.where(jnp.arange(rows)[:, None] < text_tokens, per_side[0], per_side[1])


def factors_for(prepared: Replacement, graph: Graph, nodes: np.ndarray, factor: float) -> Groups:
    """Returns the factors that scale some feature nodes of a graph of one step, at every position.

    Args:
        prepared: replacement of the step.
        graph: whose `node_block` and `node_stream` say where the features lie.
        nodes: of the graph.
        factor: for each. In a single-stream block it acts on both streams' positions.

    Raises:
        ValueError: if a node is no feature.
    """
    run = graph.provenance.traced_run
    depth, recorded = run.depths[0], list(run.recorded)
    if np.any(graph.node_kind[nodes] != FEATURE):
        raise ValueError("Only features can be scaled, but a node is none.")
    made = []
    for group, (sites, like) in enumerate(zip(prepared.sites, prepared.sources.errors, strict=True)):
        first = prepared.sources.values.img.shape[0] if group == 2 else 0
        made.append(np.ones((like.shape[0], _features(sites)), like.dtype))
        for node in nodes:
            block, stream = int(graph.node_block[node]), int(graph.node_stream[node])
            if (2 if block >= depth else stream) == group:
                made[-1][recorded.index(block) - first, graph.node_feature[node]] = factor
    return Groups(*(jnp.asarray(one) for one in made))


def _features(sites: Sites) -> int:
    return 0 if sites.stack is None else sites.stack.config.features


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


def effects(graph: Graph) -> Float64[np.ndarray, "node"]:
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
