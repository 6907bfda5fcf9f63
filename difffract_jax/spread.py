"""One evaluation over several devices: which values of a program are split, and along which axis.

1. A mesh's axes `site` and `feature` split a model between them (`MODEL_AXES`): one evaluation goes through its layers
   one after the other, so that devices can share out a layer, but not the layers.
2. Weights say by themselves where they live. XLA partitions the program accordingly, and mostly finds for itself how
   values between them are best split; where it would hold something large on every device, `spread` tells it.
3. `on_mesh_of` makes the mesh of some weights the one in use; without one, nothing here does anything.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

MODEL_AXES = ("site", "feature")
"""Mesh axes that split a model between them where it is evaluated once, not trained."""


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of several devices that a tree's arrays live on; None if they live on one device."""
    for leaf in jax.tree.leaves(tree):
        placed = getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh) and placed.mesh.size > 1:
            return placed.mesh
    return None


def on_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """Makes the mesh that a tree's arrays live on the one in use, if there is one."""
    return using(mesh_of(tree))


def using(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Makes a mesh the one in use; None changes nothing."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def ways_of(mesh: Any) -> int:
    """Returns into how many parts a mesh, or a mesh's sizes by axis, split a model; 1 without model axes."""
    sizes = dict(getattr(mesh, "shape", mesh))
    return sizes.get(MODEL_AXES[0], 1) * sizes.get(MODEL_AXES[1], 1)


def ways(size: int) -> int:
    """Returns into how many parts the mesh in use splits an axis of that size; 1 where it does not divide."""
    parts = ways_of(jax.sharding.get_abstract_mesh())
    return parts if size % parts == 0 else 1


def spread(x: Array, *axes: int) -> Array:
    """Splits a value of a compiled program along the first of some axes that divides evenly; else it is left alone.

    Args:
        x: the value.
        axes: to choose from, the best first.
    """
    found = next((axis for axis in axes if ways(x.shape[axis]) > 1), None)
    return x if found is None else jax.lax.with_sharding_constraint(x, spread_over(x.ndim, found))


def whole(x: Array) -> Array:
    """Has every device that shares a model hold all of a value; without a mesh in use it is left alone."""
    return x if ways(0) == 1 else jax.lax.with_sharding_constraint(x, PartitionSpec())


def in_step(count: Array) -> Array:
    """Returns the largest of all shares' counts, where the devices of each share split a model; else the count itself.

    A loop whose devices exchange values must run equally often on all devices of a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.pmax(count, mesh.manual_axes) if mesh.manual_axes and ways_of(mesh) > 1 else count


def spread_over(ndim: int, axis: int) -> PartitionSpec:
    """Returns the spec that splits one axis over the model axes."""
    return PartitionSpec(*(MODEL_AXES if at == axis else None for at in range(ndim)))
