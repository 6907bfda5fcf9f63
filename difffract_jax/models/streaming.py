"""Stacks that are not in memory as a whole: each layer is fetched when its turn comes, the next one meanwhile.

1. A `LayerSource` gives the arrays of one layer: from files (`storage.layers`, `converters.streaming`), or from host
   memory (`HostLayers`).
2. `Streamed` stands where a stack of weights would stand in a model; `stacks.run_stack` knows it, and runs one compiled
   program per layer in a loop on the host. A layer is on the device only while it is needed.
3. `jit_resident` is `jax.jit` for functions that run a model: with a streamed one, the function is called as it is,
   since a program over all layers would need them all.

What a loop on the host costs is a call per layer; a scan from host memory saves that on TPUs, but not on GPUs, where it
is slow, nor from disk. One way serves all three.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import wraps
from time import perf_counter
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from difffract_jax.address import Group
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import leaf_paths

P, R = ParamSpec("P"), TypeVar("R")
Weights = Literal["device", "host", "disk"]
"""Where stacks stay: whole on the device; or in host memory or on disk, from where a layer is fetched for its turn."""
Take = Mapping[str, tuple[int, np.ndarray]]
"""Path of a leaf of a layer -> axis, and the indices along it that are wanted."""
ALIGNMENT = 64
"""Bytes to which arrays on the host are aligned: such ones JAX takes over on a processor without copying them."""


@runtime_checkable
class LayerSource(Protocol):
    """Gives the weights of one layer after the other."""

    @property
    def depth(self) -> int:
        """How many layers there are."""
        ...

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one layer's tree of NumPy arrays, which the caller may keep.

        Args:
            layer: its number.
            take: path of a leaf -> axis, and the indices along it that are wanted; all of other leaves.

        Raises:
            UserError: if its file has changed or gone meanwhile.
        """
        ...

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        ...


class HostLayers:
    """Layers in host memory.

    Attributes:
        layers: the tree of each.
    """

    def __init__(self, layers: Iterable[Any], like: Any) -> None:
        """Takes the layers.

        Args:
            layers: the tree of each.
            like: shapes and types of one, which are known where there is none.
        """
        self.layers, self._like = list(layers), like

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one layer's arrays; whole ones are not copied."""
        return self.layers[layer] if take is None else take_some(self.layers[layer], take)

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        return self._like


@dataclass
class Reading:
    """What streaming has cost so far; readers of several stacks may add to one.

    Attributes:
        layers: how many were fetched.
        nbytes: what they came to.
        seconds: that reading them took, whether or not something else ran meanwhile.
        waited: seconds in which nothing ran because a layer was not there yet.
    """

    layers: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, nbytes: int, seconds: float) -> None:
        """Counts one layer."""
        with self.lock:
            self.layers, self.nbytes, self.seconds = self.layers + 1, self.nbytes + nbytes, self.seconds + seconds


READING = Reading()
"""What this process has streamed."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Streamed:
    """A stack of layers that are fetched one at a time; a node without leaves in a tree of weights.

    Attributes:
        source: gives the layers.
        groups: of the MLP sublayers of each layer; () for what are not blocks.
        numbers: of the layers in the source; None for one that is not there, as the transcoder of a block without one,
            which is fetched as None.
    """

    source: LayerSource
    groups: tuple[Group, ...]
    numbers: tuple[int | None, ...]

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len(self.numbers)

    def layers(self, chosen: slice) -> "Streamed":
        """Returns a run of the layers."""
        return replace(self, numbers=self.numbers[chosen])

    def pick(self, chosen: Iterable[int | None]) -> "Streamed":
        """Returns some of the layers; None stands for one that is not there."""
        return replace(self, numbers=tuple(None if layer is None else self.numbers[layer] for layer in chosen))

    def fetch(self, layer: int) -> Any:
        """Returns one layer, on the device.

        Args:
            layer: counted from the stack's first.
        """
        refuse_compilation()
        begin, number = perf_counter(), self.numbers[layer]
        if number is None:
            return None
        tree = self.source.read(number)
        # Aligned arrays are taken over on a processor: `jnp.asarray` would copy them.
        fetched = jax.device_put(tree)
        READING.add(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), perf_counter() - begin)
        return fetched

    def abstract(self) -> Any:
        """Returns the shapes and types of a layer."""
        return self.source.abstract()

    def __iter__(self) -> Iterator[Any]:
        """Yields every layer, in order."""
        for _, layer in self.fetched(range(self.depth)):
            yield layer
            del layer  # else it would be held while the one after next is fetched

    def fetched(self, order: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Yields layers with their numbers; while one is used, the next is fetched.

        Args:
            order: of the layers, counted from the stack's first.
        """
        refuse_compilation()
        numbers = list(order)
        with ThreadPoolExecutor(1, "layers") as pool:
            coming = pool.submit(self.fetch, numbers[0]) if numbers else None
            for place, number in enumerate(numbers):
                assert coming is not None
                begin = perf_counter()
                layer = coming.result()
                READING.waited += perf_counter() - begin
                coming = pool.submit(self.fetch, numbers[place + 1]) if place + 1 < len(numbers) else None
                yield number, layer
                del layer  # two are in memory at most: this one is gone before a third is asked for


def refuse_compilation() -> None:
    """Refuses to fetch layers while a function is compiled.

    Raises:
        UserError: if one is.
    """
    # While a function is compiled, even a constant is traced; under `jax.vmap` it is not.
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise UserError(
            "This runs all layers in one program, but those of the model or the transcoders are streamed; load them "
            'with weights="device" (--weights device).'
        )


def refuse_streamed(*trees: Any) -> None:
    """Refuses trees that are streamed, of what reads all of their layers, or more of them than a record keeps.

    Args:
        trees: models, transcoders, records.

    Raises:
        UserError: if anything in them is streamed.
    """
    if streams_layers(*trees):
        raise UserError(
            "This needs whole blocks and transcoders in memory, but some are streamed; load the model and the "
            'transcoders with weights="device" (--weights device).'
        )


def wait_for(tree: Any) -> None:
    """Waits until arrays are there, so that what computes them lets go of the layers that it was given.

    Args:
        tree: of arrays, also of those that `jax.vmap` hands out.
    """

    def of_all(leaf: Any) -> Any:
        while isinstance(leaf, jax.core.Tracer):
            leaf = getattr(leaf, "val", None)
        return leaf

    jax.block_until_ready([of_all(leaf) for leaf in jax.tree.leaves(tree)])


def is_streamed(node: Any) -> bool:
    """Says whether a node of a tree is a streamed stack."""
    return isinstance(node, Streamed)


def streams_layers(*trees: Any) -> bool:
    """Says whether anything in some trees is streamed."""
    return any(map(is_streamed, jax.tree.leaves(trees, is_leaf=is_streamed)))


def jit_resident(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """Compiles a function as `jax.jit` does, but calls it as it is where a streamed stack is among its arguments.

    Args:
        function: calls `stacks.run_stack`, perhaps within `jax.vmap`, but not within `jax.lax.scan`.
        options: of `jax.jit`.
    """
    compiled = jax.jit(function, **options)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if streams_layers(args, kwargs) else compiled(*args, **kwargs)

    # What a compiled function offers besides being called; counting its programs tells whether one was enough.
    for name in ("lower", "clear_cache", "_cache_size"):
        setattr(call, name, getattr(compiled, name))
    return call


def take_some(tree: Any, take: Take) -> Any:
    """Returns a tree of NumPy arrays with some indices of some leaves.

    Args:
        tree: of one layer.
        take: which.
    """
    leaves = leaf_paths(tree)
    some = [np.take(leaf, take[path][1], take[path][0]) if path in take else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), some)


def with_sources(abstract: Any, sources: Mapping[str, LayerSource], weights: Weights) -> Any:
    """Returns a module's shapes with streamed stacks in place of some of its own.

    Args:
        abstract: the module's shapes.
        sources: attribute that holds a stack -> what gives its layers, from disk.
        weights: `host` to read all layers now and keep them there, `disk` not to.
    """
    made = jax.tree.map(lambda leaf: leaf, abstract)
    for name, files in sources.items():
        setattr(made, name, nnx.data(streamed(files, getattr(made, name).groups, weights)))
    return made


def streamed(
    files: LayerSource, groups: tuple[Group, ...], weights: Weights, layers: Iterable[int] | None = None
) -> Streamed:
    """Returns a stack of layers of files.

    Args:
        files: gives the layers from disk.
        groups: of the MLP sublayers of each.
        weights: `host` to read the layers now and keep them there, `disk` not to.
        layers: those wanted, by number; all if left out.
    """
    chosen = tuple(range(files.depth)) if layers is None else tuple(layers)
    if weights == "host":
        return Streamed(HostLayers(map(files.read, chosen), files.abstract()), groups, tuple(range(len(chosen))))
    return Streamed(files, groups, chosen)


def whole(tree: Any) -> Any:
    """Returns a tree with every streamed stack read into memory.

    Args:
        tree: of weights; NumPy arrays stand for what was streamed.
    """

    def read(node: Any) -> Any:
        if not isinstance(node, Streamed):
            return node
        layers = [node.source.read(number) for number in node.numbers if number is not None]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    return jax.tree.map(read, tree, is_leaf=is_streamed)


def whole_bytes(tree: Any) -> int:
    """Returns how many bytes a tree of weights comes to, what is streamed included.

    Args:
        tree: of arrays, or of their shapes.
    """
    total = 0
    for node in jax.tree.leaves(tree, is_leaf=is_streamed):
        streamed = isinstance(node, Streamed)
        leaves = jax.tree.leaves(node.abstract() if isinstance(node, Streamed) else node)
        total += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) * (node.depth if streamed else 1)
    return total


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an empty array on the host at an address that suits JAX; see `ALIGNMENT`.

    Args:
        shape: of the array.
        dtype: of the array.
    """
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].view(kind).reshape(shape)


def stack_trees(trees: list[Any]) -> Any:
    """Puts trees on a new leading axis, leaf by leaf; the list is emptied, so that no leaf is held twice for long.

    Args:
        trees: at least one; all of one structure.
    """
    structure = jax.tree.structure(trees[0])
    columns = [list(column) for column in zip(*map(jax.tree.leaves, trees), strict=True)]
    trees.clear()
    joined = []
    for column in columns:
        joined.append(jnp.stack(column))
        column.clear()
    return jax.tree.unflatten(structure, joined)


def no_layers(like: Any) -> Any:
    """Returns what stacking the trees of no layers gives.

    Args:
        like: shapes of one.
    """
    return jax.tree.map(lambda leaf: jax.device_put(np.zeros((0, *leaf.shape), leaf.dtype)), like)
