"""What dead features alone make of a batch: the strongest few of every row, decoded, at the cost of the dead ones.

    y[row] = sum over dead features f with u[row, f] > cut[row] of u[row, f] W_dec[f];    cut >= 0 leaves `most` per row

1. `row_cutoffs` finds each row's cut by halving an interval of float32's own bit patterns, which takes counts alone: no
   sort, no list of places, and where features are split over devices nothing travels but the counts. With no more dead
   features than places nothing needs to be cut, and it is skipped.
2. Dead features are listed, and gathered `BLOCK` at a time: the columns of u, the rows of W_dec. A loop takes as many
   blocks as there are dead features, none at all if there are none. The products are as large as the dead features are
   many, forward and backward, and only one block is in memory.
3. On a mesh every device goes through the dead ones of its own features, and the results are summed over `feature`.

The numbers are those of a dense product with the `most` largest of each row, in another order; of entries that are
equal at the cut none is taken.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

BLOCK = 1024
"""Dead features whose columns and rows are gathered together."""
_WORDS = {4: jnp.int32, 8: jnp.int64}


def matmul(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"], bf16: bool) -> Float[Array, "rows columns"]:
    """Multiplies two float32 matrices; with `bf16`, rounded to bfloat16 first, but summed in float32.

    By JAX's default an accelerator would round float32 factors, too.
    """
    if not bf16:
        return jnp.matmul(a, b, precision="highest")
    return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def revived(
    u: Float[Array, "rows feat"],
    kernel: Float[Array, "feat d_model_out"],
    dead: Bool[Array, "feat"],
    most: int,
    *,
    bf16: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "rows d_model_out"]:
    """Returns what the strongest dead features of every row decode to; differentiable in u and the kernel.

    Args:
        u: pre-activations.
        kernel: of the decoder.
        dead: which features count.
        most: features of a row.
        bf16: multiply in bfloat16.
        mesh: over which rows and features are spread, by `data` and `feature`; None for a single device.
    """
    return _decoded(u, kernel, row_cutoffs(jax.lax.stop_gradient(u), dead, most), dead, bf16, mesh)


def row_cutoffs(u: Float[Array, "rows feat"], dead: Bool[Array, "feat"], most: int) -> Float[Array, "rows"]:
    """Returns for each row the least value, at least 0, that no more than `most` of its dead features exceed."""
    word = _WORDS[u.dtype.itemsize]

    def value(bits: Int[Array, "rows"]) -> Float[Array, "rows"]:
        return jax.lax.bitcast_convert_type(bits, u.dtype)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        crowded = jnp.sum((u > value(middle)[:, None]) & dead[None], axis=1) > most
        return jnp.where(crowded, middle, low), jnp.where(crowded, high, middle)

    def search() -> Float[Array, "rows"]:
        largest = jnp.max(jnp.where(dead[None], u, 0), axis=1, initial=0)
        ends = jnp.zeros(u.shape[0], word), jax.lax.bitcast_convert_type(largest, word)
        return value(jax.lax.fori_loop(0, 8 * u.dtype.itemsize - 1, halve, ends)[1])

    return jax.lax.cond(jnp.sum(dead) > most, search, lambda: jnp.zeros(u.shape[0], u.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _decoded(u: Array, kernel: Array, cut: Array, dead: Array, bf16: bool, mesh: Mesh | None) -> Array:
    def local(u: Array, kernel: Array, cut: Array, dead: Array) -> Array:
        y = _forward(u, kernel, cut, dead, bf16)
        return y if mesh is None else jax.lax.psum(y, "feature")

    return _on_mesh(local, mesh, PartitionSpec("data"))(u, kernel, cut, dead)


def _decoded_forward(u: Array, kernel: Array, cut: Array, dead: Array, bf16: bool, mesh: Mesh | None) -> Any:
    return _decoded(u, kernel, cut, dead, bf16, mesh), (u, kernel, cut, dead)


def _decoded_backward(bf16: bool, mesh: Mesh | None, saved: tuple[Array, ...], g: Array) -> tuple:
    def local(u: Array, kernel: Array, cut: Array, dead: Array, g: Array) -> tuple[Array, Array]:
        to_u, to_kernel = _backward(u, kernel, cut, dead, g, bf16)
        return to_u, to_kernel if mesh is None else jax.lax.psum(to_kernel, "data")

    places = PartitionSpec("data", "feature"), PartitionSpec("feature")
    to_u, to_kernel = _on_mesh(local, mesh, places, PartitionSpec("data"))(*saved, g)
    return to_u, to_kernel, None, None


_decoded.defvjp(_decoded_forward, _decoded_backward)


def _on_mesh(local: Callable[..., Any], mesh: Mesh | None, out: Any, *more: PartitionSpec) -> Callable[..., Any]:
    """Returns a function of u, kernel, cut, dead and more that every device computes on its own rows and features."""
    if mesh is None:
        return local
    given = PartitionSpec("data", "feature"), PartitionSpec("feature"), PartitionSpec("data"), PartitionSpec("feature")
    return jax.shard_map(local, mesh=mesh, in_specs=(*given, *more), out_specs=out, check_vma=False)


def _blocks(dead: Bool[Array, "feat"]) -> tuple[Int[Array, "place"], Int[Array, ""], int]:
    """Returns the dead features in order, padded with the number of features; how many blocks they fill; their size."""
    features = dead.shape[0]
    size = min(BLOCK, features)
    listed = jnp.sort(jnp.where(dead, jnp.arange(features, dtype=jnp.int32), features))
    listed = jnp.pad(listed, (0, -features % size), constant_values=features)
    return listed, -(-jnp.sum(dead, dtype=jnp.int32) // size), size


def _strong(u: Array, cut: Array, feature: Int[Array, "member"]) -> Float[Array, "rows member"]:
    """Returns the columns of some features where they exceed the cut, and 0 elsewhere; of no feature, 0."""
    column = u.at[:, feature].get(mode="fill", fill_value=0)
    return jnp.where(column > cut[:, None], column, 0)


def _forward(u: Array, kernel: Array, cut: Array, dead: Array, bf16: bool) -> Array:
    listed, count, size = _blocks(dead)

    def add(block: Array, y: Array) -> Array:
        feature = jax.lax.dynamic_slice_in_dim(listed, block * size, size)
        return y + matmul(_strong(u, cut, feature), kernel.at[feature].get(mode="fill", fill_value=0), bf16)

    return jax.lax.fori_loop(0, count, add, jnp.zeros((u.shape[0], kernel.shape[1]), u.dtype))


def _backward(u: Array, kernel: Array, cut: Array, dead: Array, g: Array, bf16: bool) -> tuple[Array, Array]:
    listed, count, size = _blocks(dead)

    def add(block: Array, slopes: tuple[Array, Array]) -> tuple[Array, Array]:
        to_u, to_kernel = slopes
        feature = jax.lax.dynamic_slice_in_dim(listed, block * size, size)
        z = _strong(u, cut, feature)
        to_z = matmul(g, kernel.at[feature].get(mode="fill", fill_value=0).T, bf16)
        to_u = to_u.at[:, feature].set(jnp.where(z > 0, to_z, 0), mode="drop")
        return to_u, to_kernel.at[feature].set(matmul(z.T, g, bf16), mode="drop")

    return jax.lax.fori_loop(0, count, add, (jnp.zeros_like(u), jnp.zeros_like(kernel)))
