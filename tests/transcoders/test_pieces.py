"""Arrays in pieces: every piece once, put together again for another mesh, with no more rows read than needed."""

import itertools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from difffract_jax.transcoders.pieces import assembled, own_pieces, pieces_of

P = PartitionSpec
SPECS = (P(), P("a"), P(None, "b"), P("a", "b"), P(("a", "b")), P("b", "a"))


def spread(shape: tuple[int, int], spec: PartitionSpec) -> NamedSharding:
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("a", "b"))
    return NamedSharding(mesh, spec)


def test_arrays_are_put_together_for_another_mesh() -> None:
    value = np.arange(8 * 4 * 3, dtype=np.float32).reshape(8, 4, 3)
    for before, after in itertools.product(SPECS, SPECS):
        leaf = jax.device_put(value, spread((2, 2), before))
        parts, values_read = own_pieces(leaf), []
        assert sum(part.size for part in parts.values()) == value.size, before

        def read(number: int, index: tuple[slice, ...], parts=parts, values_read=values_read) -> np.ndarray:
            values_read.append(parts[number][index].size)
            return parts[number][index]

        wanted = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=spread((2, 1), after))
        made = assembled(wanted, pieces_of(leaf), read)
        assert made.sharding == wanted.sharding and np.array_equal(made, value), (before, after)
        assert sum(values_read) == value.size, "nothing is read twice"


def test_scalars_and_arrays_of_numpy_are_one_piece() -> None:
    for leaf in (np.arange(6).reshape(2, 3), jax.numpy.float32(2)):
        (piece,) = own_pieces(leaf).values()
        made = assembled(leaf, pieces_of(leaf), lambda number, index, piece=piece: piece[index])
        assert np.array_equal(made, leaf) and isinstance(made, np.ndarray) == isinstance(leaf, np.ndarray)
