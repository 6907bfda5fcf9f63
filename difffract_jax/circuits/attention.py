"""What attention does in a circuit: edges split by head, and a score split by pairs of sources (METHOD section 6).

*Head loadings.* Every path from a source to a target takes some attention hops or none. An edge is the sum over the
heads of its paths whose last hop, the one nearest to the target, is through that head, plus the paths without a hop:

1. Walk down from the target with the residual stream alone: what has taken no hop.
2. At every block, one head's part of what attention passes on is a direction of the residual stream entering the block;
   pulled back through everything below, all paths included, it gives that head's share of every edge.

*Query and key.* With the denominators of their RMS norms held, a head's query at i and key at j are affine in the
sources: q = q0 + sum_a q_a, k = k0 + sum_b k_b. Their scaled product is

    score = sum_ab <q_a, k_b> + sum_a <q_a, k0> + sum_b <q0, k_b> + <q0, k0>

Both hold for one step; in a span, for the step's own sources.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int64

from difffract_jax.circuits.contraction import gather_bytes
from difffract_jax.circuits.engine import Engine, targets_of
from difffract_jax.circuits.graph import OUTPUT
from difffract_jax.circuits.names import block_name
from difffract_jax.circuits.pullback import input_edges, layout_of, pull, velocity_cotangent
from difffract_jax.circuits.readout import DIRECTION, Targets, target_gradients
from difffract_jax.circuits.record import Record
from difffract_jax.circuits.replacement import Replacement, Sites, residuals
from difffract_jax.circuits.walk import contract_block, double_block, single_block, skip
from difffract_jax.config import UserError
from difffract_jax.models.blocks import Groups, Streams, both, split_heads
from difffract_jax.ops import film, layer_norm, rotate


class HeadLoadings(NamedTuple):
    """The edges into one target, by the head of their last attention hop.

    Attributes:
        block: the model's block of each head.
        head: its number.
        loading: share of each edge, one row per head.
        direct: share of each edge that took no hop.
    """

    block: Int64[np.ndarray, "hop"]
    head: Int64[np.ndarray, "hop"]
    loading: Float64[np.ndarray, "hop source"]
    direct: Float64[np.ndarray, "source"]


def head_loadings(engine: Engine, row: int, sources: Int64[np.ndarray, "source"] | None = None) -> HeadLoadings:
    """Splits the edges into a target by head.

    Args:
        engine: of one step, from `engine.make_engine`.
        row: the target's row of the table.
        sources: rows of the sources wanted; all if left out.

    Raises:
        UserError: if the engine is a span's.
    """
    wanted = np.arange(engine.sources) if sources is None else sources
    *layers, (_, direct) = ((block, part[:, wanted]) for block, part in loadings_by_layer(engine, row))
    counts = [len(part) for _, part in layers]
    block = np.repeat(np.array([block for block, _ in layers], np.int64), counts)
    head = np.array([head for count in counts for head in range(count)], np.int64)
    loading = np.concatenate([np.zeros((0, wanted.size)), *(part for _, part in layers)])
    return HeadLoadings(block, head, loading, direct[0])


def loadings_by_layer(
    engine: Engine, row: int
) -> Iterator[tuple[int | None, Float64[np.ndarray, "head_or_direct source"]]]:
    """Splits the edges into a target by head, one layer after another, so that one layer's heads are in memory at once.

    Args:
        engine: of one step.
        row: the target's row of the table.

    Returns:
        Per layer, top down, the model's block and its heads' loadings; at the end None and one row, the share of every
        edge that took no hop.

    Raises:
        UserError: if the engine is a span's.
    """
    if engine.across:
        raise UserError("Head loadings are those of one step, not of a span; trace a single step.")
    return _walk_directly(engine, row)


def _walk_directly(engine: Engine, row: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """Walks down from a target without attention hops, and pulls every layer's heads back with all of them."""
    prepared, info = engine.steps[0], engine.infos[0]
    record, sites, sources = prepared
    target = targets_of(engine, np.array([row]), 0)
    double, text = sources.values.img.shape[0], info.text_tokens
    boundary = sources.boundary
    cotangent: Any = (jnp.zeros((1, text + boundary.img.shape[0], boundary.img.shape[1]), boundary.img.dtype),)
    # The context must not stay open across a yield: it is the caller's, too.
    highest = partial(jax.default_matmul_precision, "highest")
    with highest():
        gradient = target_gradients(record, sites, target)
        if engine.table.kind[row] == OUTPUT:
            cotangent = (velocity_cotangent(prepared, engine.outputs[row - engine.sources].velocity[None]),)
    per_layer = layout_of(sources).per_layer
    direct = []
    for layer in reversed(range(len(info.recorded))):
        if layer == double - 1:
            cotangent = (cotangent[0][:, text:], cotangent[0][:, :text])
        at = jnp.int32(layer if layer < double else layer - double)
        one = double_block if layer < double else single_block
        empty = jnp.zeros((1, per_layer[int(layer >= double)]), boundary.img.dtype)
        corner, gather = (jnp.int32(0), jnp.int32(0)), gather_bytes(jax.default_backend())
        with highest():
            here = one(record, sites, sources, at)
            direct.insert(0, np.asarray(contract_block(here, empty, corner, cotangent, 1, gather))[0])
            passed, cotangent = _without_hops(record, sites, cotangent, target, gradient, layer)
            loadings = [_edges_below(prepared, layer, passed)]
        # Nothing of this layer may stay in memory while the next one is computed.
        del here, passed
        yield info.recorded[layer], loadings.pop()
    if not double:
        cotangent = (cotangent[0][:, text:], cotangent[0][:, :text])
    with highest():
        direct.append(np.asarray(input_edges(Streams(*cotangent), boundary))[0])
    if record.velocity is not None:
        # The latents' own edges are an objective's direct dependence on them.
        output = engine.outputs[row - engine.sources].latents if engine.table.kind[row] == OUTPUT else 0
        direct.append(np.asarray(jnp.sum(output * record.latents, axis=1)))
    yield None, np.concatenate(direct)[None].astype(np.float64)


def _edges_below(
    prepared: Replacement, layer: int, directions: Float[Array, "hop seq d_model"]
) -> Float64[np.ndarray, "hop source"]:
    """Returns the edges of directions of the residual stream entering a layer; the latents have none."""
    count = directions.shape[0]
    same = [jnp.full(count, value, jnp.int32) for value in (DIRECTION, layer, 0, 0)]
    pulled = pull(prepared, Targets(*same), directions)
    inputs = input_edges(pulled.boundary, prepared.sources.boundary)
    record = prepared.record
    latents = np.zeros((count, 0 if record.velocity is None else record.latents.shape[0]))
    parts = (np.asarray(pulled.edges, np.float64), np.asarray(inputs, np.float64), latents)
    return np.concatenate(parts, axis=1)


@partial(jax.jit, static_argnames="layer")
def _without_hops(
    record: Record,
    sites: Groups,
    cotangent: tuple[Array, ...],
    target: Targets,
    gradient: Float[Array, "one d_model"],
    layer: int,
) -> tuple[Float[Array, "head seq d_model"], tuple[Array, ...]]:
    """Pulls the residual stream's own cotangent through a block; returns what heads pass on, and the cotangent."""
    double = record.mlp_in.img.shape[0]
    joint = layer >= double
    at = layer - double if joint else layer
    weights, record_of = (
        (record.weights.single, record.frozen_single) if joint else (record.weights.double, record.frozen)
    )
    block, frozen = jax.tree.map(lambda leaf: leaf[at], (weights, record_of))
    here = [Sites(s.stack, jax.tree.map(lambda leaf: leaf[at], s.layers)) for s in (sites[2:] if joint else sites[:2])]
    groups = (2,) if joint else (0, 1)
    into = tuple(
        _scatter_one(gradient[0], target, layer, g, c.shape[1:]) for g, c in zip(groups, cotangent, strict=True)
    )

    def pulled(mask: Float[Array, "heads"]) -> tuple[Array, ...]:
        def forward(h: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            if joint:
                after, acts = block(h[0], record.cond, frozen=frozen, mlp=lambda _, x: skip(here[0], x), heads=mask)
                return (after,), (acts.mlp_in,)
            after, acts = block(
                Streams(*h), record.cond, frozen=frozen, mlp=lambda _, x: both(skip, Streams(*here), x), heads=mask
            )
            return tuple(after), tuple(acts.mlp_in)

        _, pull_one = jax.vjp(forward, tuple(jnp.zeros(c.shape[1:], c.dtype) for c in cotangent))
        return pull_one((tuple(c[0] for c in cotangent), into))[0]

    heads = frozen.q.shape[1]
    masks = jnp.concatenate([jnp.zeros((1, heads)), jnp.eye(heads)]).astype(gradient.dtype)
    h = jax.vmap(pulled)(masks)
    passed = [leaf[1:] - leaf[:1] for leaf in h]
    return passed[0] if joint else jnp.concatenate(passed[::-1], axis=1), tuple(leaf[:1] for leaf in h)


def _scatter_one(
    gradient: Float[Array, "d_model"], target: Targets, layer: int, group: int, shape: tuple[int, ...]
) -> Float[Array, "rows d_model"]:
    """Puts the target's gradient at its position, if it is of this layer and group."""
    mine = (target.layer[0] == layer) & (target.group[0] == group)
    rows = jnp.zeros(shape, gradient.dtype)
    return rows.at[target.position[0]].set(jnp.where(mine, gradient, 0), mode="drop")


class ScoreParts(NamedTuple):
    """One attention score as a bi-affine function of the sources.

    Attributes:
        queries: every source's part of the query, scaled by 1/sqrt(head_dim), [head_dim source].
        keys: every source's part of the key.
        query_constant: what the query is at zero sources, scaled alike.
        key_constant: the same of the key.
        score: of the trace, before the softmax.
    """

    queries: Float64[np.ndarray, "head_dim source"]
    keys: Float64[np.ndarray, "head_dim source"]
    query_constant: Float64[np.ndarray, "head_dim"]
    key_constant: Float64[np.ndarray, "head_dim"]
    score: float

    @property
    def query_terms(self) -> Float64[np.ndarray, "source"]:
        """<q_a, k0> of every source."""
        return self.key_constant @ self.queries

    @property
    def key_terms(self) -> Float64[np.ndarray, "source"]:
        """<q0, k_b> of every source."""
        return self.query_constant @ self.keys

    @property
    def constant(self) -> float:
        """<q0, k0>."""
        return float(self.query_constant @ self.key_constant)

    def pairs(
        self, a: Int64[np.ndarray, "query_source"], b: Int64[np.ndarray, "key_source"]
    ) -> Float64[np.ndarray, "query_source key_source"]:
        """Returns <q_a, k_b> of some sources: rows of the table on the query's side, and on the key's."""
        return self.queries[:, a].T @ self.keys[:, b]


def score_parts(engine: Engine, block: int, head: int, query: tuple[str, int], key: tuple[str, int]) -> ScoreParts:
    """Splits one attention score by the sources of query and key.

    Args:
        engine: of one step.
        block: the model's block; single-stream blocks count on after the double-stream ones.
        head: of the block.
        query: stream, "img" or "txt", and position of the token that attends.
        key: the same of the token that is attended to.

    Raises:
        UserError: if there is no such block, head or token in the trace, or the engine is a span's.
    """
    if engine.across:
        raise UserError("An attention score is one step's, not a span's; trace a single step.")
    prepared, info = engine.steps[0], engine.infos[0]
    if block not in info.recorded:
        first, last, asked = (block_name(one, info.depths[0]) for one in (info.recorded[0], info.recorded[-1], block))
        raise UserError(f"The trace recorded the blocks {first} to {last}, but not {asked}.")
    layer = info.recorded.index(block)
    record = prepared.record
    frozen = record.frozen if block < info.depths[0] else record.frozen_single
    if not 0 <= head < frozen.q.shape[2]:
        name = block_name(block, info.depths[0])
        raise UserError(f"The block {name} has heads 0 to {frozen.q.shape[2] - 1}, but got {head}.")
    places = []
    for stream, position in (query, key):
        rows = {"img": record.boundary.img.shape[0], "txt": info.text_tokens}
        if stream not in rows or not 0 <= position < rows[stream]:
            raise UserError(
                f"There is no token {stream}{position}; the run has {rows['img']} image tokens, from img0 on, and "
                f"{rows['txt']} text tokens, from txt0 on."
            )
        places.append(position + (info.text_tokens if stream == "img" else 0))
    with jax.default_matmul_precision("highest"):
        sides = [_side(engine, layer, head, place, part) for part, place in enumerate(places)]
    (q, q0, q_true), (k, k0, k_true) = sides
    scale = float(frozen.q.shape[3]) ** -0.5
    return ScoreParts(q * scale, k, q0 * scale, k0, float(scale * (q_true @ k_true)))


def _side(engine: Engine, layer: int, head: int, place: int, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns every source's part of a query (part 0) or key (1), its constant, and its value in the trace."""
    prepared, text = engine.steps[0], engine.infos[0].text_tokens
    record, sites, sources = prepared
    double = sources.values.img.shape[0]

    def row_at(at: Any) -> Array:
        streams, joint = residuals(record, sites, at)
        if layer >= double:
            return joint[layer - double, place]
        return streams.txt[layer, place] if place < text else streams.img[layer, place - text]

    true_row = row_at(sources)
    project = partial(_project_row, record, layer, head, place, part)
    denominator = project(true_row, None)[1]
    affine = lambda h: project(h, denominator)[0]  # noqa: E731  (closed over what is held)
    value, pull_row = jax.vjp(affine, true_row)
    directions = jax.vmap(lambda unit: pull_row(unit)[0])(jnp.eye(value.size, dtype=value.dtype))
    seq = text + sources.boundary.img.shape[0]
    full = jnp.zeros((value.size, seq, true_row.size), value.dtype).at[:, place].set(directions)
    edges = _edges_below(prepared, layer, full)
    constant = affine(row_at(jax.tree.map(jnp.zeros_like, sources)))
    return edges, np.asarray(constant, np.float64), np.asarray(value, np.float64)


def _project_row(
    record: Record, layer: int, head: int, place: int, part: int, h: Float[Array, "d_model"], denominator: Array | None
) -> tuple[Float[Array, "head_dim"], Array]:
    """Returns one head's rotated query or key of a residual row, with its RMS scale held if given, and the scale."""
    double, text = record.mlp_in.img.shape[0], record.boundary.txt.shape[0]
    if layer >= double:
        block = jax.tree.map(lambda leaf: leaf[layer - double], record.weights.single)
        shift, scale = block.mod(jax.nn.silu(record.cond.vec)).reshape(3, -1)[:2]
        inv_std = record.frozen_single.inv_std[layer - double, place]
        qkv, norms = block.qkv, (block.q_norm, block.k_norm)
    else:
        stream = jax.tree.map(lambda leaf: leaf[layer], record.weights.double)
        stream, name, at = (stream.txt, "txt", place) if place < text else (stream.img, "img", place - text)
        shift, scale = stream.mod(jax.nn.silu(record.cond.vec)).reshape(6, -1)[:2]
        inv_std = getattr(record.frozen.inv_std1, name)[layer, at]
        qkv, norms = stream.attn.qkv, (stream.attn.q_norm, stream.attn.k_norm)
    m = film(layer_norm(h[None], inv_std[None])[0], scale, shift)
    width = h.size
    columns = slice(part * width, (part + 1) * width)
    raw = split_heads(m @ qkv.kernel[:, columns] + qkv.bias[None, columns], norms[part].scale.shape[-1])[:, head]
    if denominator is None:
        denominator = jax.lax.rsqrt(jnp.mean(jnp.square(raw)) + 1e-6)
    normed = raw * denominator * norms[part].scale[...]
    turned = rotate(normed[:, None], record.cond.cos[place][None], record.cond.sin[place][None])
    return turned[0, 0], denominator
