"""Applying a function of one site to a stack of sites: all together, or one after another, in the memory of one.

1. All together is `vmap` over the site axis: fewest operations, but everything in between exists for every site.
2. One after another, what lies in between exists for a single site. In place, the loop's carry is the stack itself: a
   step reads its site's slice and writes it back, so that a donated stack stays where it is. A CPU's compiler orders
   operations by what they need alone, so that it would copy such a stack at every turn: there a second one is made.
3. Where the mesh splits the sites, every shard loops over its own: [site] = [shard, site of the shard], mapped over the
   first axis, which takes no communication.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int


def update_sites(
    step: Callable[[Any, Any], tuple[Any, Any]],
    stack: Any,
    given: Any,
    *,
    shards: int = 1,
    in_turn: bool = False,
    in_place: bool = False,
) -> tuple[Any, Any]:
    """Returns the stack after a step of every site, and what the steps reported.

    Args:
        step: from one site's slices of `stack` and `given` to its slice of the stack afterwards, and a report.
        stack: tree with a leading site axis.
        given: the same; read alone.
        shards: parts into which a mesh splits the sites.
        in_turn: take one site of a shard after another.
        in_place: let the loop carry the stack, rather than make a second one.
    """
    sites = jax.tree.leaves(stack)[0].shape[0]
    if not in_turn:
        return _mapped(step, shards)(stack, given)
    if sites == 1:  # without the copies that a loop makes
        alone = step(*jax.tree.map(lambda a: a[0], (stack, given)))
        return jax.tree.map(lambda a: a[None], alone)
    loop = partial(_in_place, step) if in_place else partial(_one_by_one, step)
    if shards == 1:
        return loop(stack, given)
    parts = jax.tree.map(lambda a: a.reshape(shards, -1, *a.shape[1:]), (stack, given))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), _mapped(loop, shards)(*parts))


def make_sites(make: Callable[[Any], Any], given: Any, *, shards: int = 1) -> Any:
    """Returns what a function makes of each site, on a leading site axis, one site of a shard after another.

    Args:
        make: from one site's slice of `given`.
        given: tree with a leading site axis.
        shards: parts into which a mesh splits the sites.
    """
    if shards == 1:
        return jax.lax.map(make, given)
    parts = jax.tree.map(lambda a: a.reshape(shards, -1, *a.shape[1:]), given)
    made = _mapped(partial(jax.lax.map, make), shards)(parts)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)


def _mapped(function: Callable[..., Any], shards: int) -> Callable[..., Any]:
    """Maps over an axis that the mesh axis `site` splits into some parts."""
    return jax.vmap(function, spmd_axis_name="site") if shards > 1 else jax.vmap(function)


def _plain(tree: Any) -> Any:
    """Returns a tree of arrays that lie in memory with their last axis innermost."""
    return jax.tree.map(lambda a: with_layout_constraint(a, Layout(tuple(range(a.ndim)))), tree)


def _one_by_one(step: Callable[[Any, Any], tuple[Any, Any]], stack: Any, given: Any) -> tuple[Any, Any]:
    return jax.lax.map(lambda both: step(*both), (stack, given))


def _in_place(step: Callable[[Any, Any], tuple[Any, Any]], stack: Any, given: Any) -> tuple[Any, Any]:
    def at(tree: Any, site: Int[Array, ""] | int) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, site, keepdims=False), tree)

    def put(tree: Any, parts: Any, site: Int[Array, ""]) -> Any:
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, site, 0), tree, parts)

    def turn(site: Int[Array, ""], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        stack, reports = carry
        # Before anything is written everything has been read, and a site's arrays are laid out as the stack's: else the
        # compiler keeps copies of the whole stack.
        after, report = jax.lax.optimization_barrier(step(_plain(at(stack, site)), at(given, site)))
        return put(stack, _plain(after), site), put(reports, report, site)

    sites = jax.tree.leaves(stack)[0].shape[0]
    one = jax.eval_shape(step, at(stack, 0), at(given, 0))[1]
    reports = jax.tree.map(lambda leaf: jnp.zeros((sites, *leaf.shape), leaf.dtype), one)
    return jax.lax.fori_loop(0, sites, turn, (stack, reports))
