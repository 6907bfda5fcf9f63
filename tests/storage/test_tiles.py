"""Matrices in tiles: they are put together as they were, and a shard of rows or columns lies in few ranges."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.storage import headers, tiles
from difffract_jax.storage.files import TensorFile, write_tensors
from difffract_jax.storage.tiles import Tiling, full_index, part_of, spans, tiled, untiled

TILINGS = [Tiling(*parts, by_column) for parts in ((1, 4), (2, 1), (2, 4), (4, 2)) for by_column in (True, False)]
SHAPES = [(8, 12), (3, 8, 12), (2, 2, 4, 4)]
INDICES = [(), (slice(1, 2),), (..., slice(3, 8)), (..., slice(2, 7), slice(0, 12)), (..., slice(4, 8), slice(3, 6))]


def index_of(given: tuple, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Returns a slice for every axis; `...` stands for all that are not named."""
    if given[:1] == (...,):
        given = (*[slice(None)] * (len(shape) - len(given) + 1), *given[1:])
    return full_index(given, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_what_is_cut_into_tiles_are_those_of_the_array_and_lie_where_spans_says(shape: tuple) -> None:
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for tiling, given in itertools.product((None, *TILINGS), INDICES):
        if tiling is not None and (shape[-2] % tiling.rows or shape[-1] % tiling.columns):
            continue
        stored = value if tiling is None else tiled(value, tiling)
        if tiling is not None:
            assert stored.shape == tiling.stored(shape) and tiling.shape(stored.shape) == shape
            assert np.array_equal(untiled(stored, tiling), value)
        index = index_of(given, shape)
        blank = np.full(stored.nbytes, 0xFF, np.uint8)  # which are not-a-number where nothing was fetched
        for begin, end in spans(shape, 4, tiling, index):
            blank[begin:end] = stored.reshape(-1).view(np.uint8)[begin:end]
        there = blank.view(np.float32).reshape(stored.shape)
        part = there[index] if tiling is None else part_of(there, shape, tiling, index)
        assert np.array_equal(part, value[index]), (tiling, given)


def test_a_shard_of_columns_is_one_range_of_a_matrix_in_tiles_and_all_rows_of_one_without() -> None:
    shape, columns = (4, 1024, 1024), full_index((slice(None), slice(None), slice(256, 512)), (4, 1024, 1024))
    whole = 4 * 1024 * 1024 * 2
    assert spans(shape, 2, None, columns) == [(0, whole)]
    cut = spans(shape, 2, Tiling(4, 16, True), columns)
    assert len(cut) == 4 and sum(end - begin for begin, end in cut) == whole // 4
    rows = full_index((slice(None), slice(256, 512)), shape)
    of_rows = spans(shape, 2, Tiling(4, 16, True), rows)
    assert len(of_rows) == 64 and sum(end - begin for begin, end in of_rows) == whole // 4
    assert spans((8,), 4, None, (slice(2, 5),)) == [(8, 20)] and spans((), 4, None, ()) == [(0, 4)]
    assert spans((3, 0), 4, None, full_index((), (3, 0))) == []


def test_a_file_holds_tiles_and_its_tensors_are_read_in_every_way(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "m.safetensors"
    arrays = {
        "stack": rng.normal(size=(3, 8, 12)).astype(ml_dtypes.bfloat16),
        "plain": rng.normal(size=(3, 8, 12)).astype(np.float32),
        "matrix": rng.normal(size=(4, 6)),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    cut = {"stack": Tiling(2, 4, True), "matrix": Tiling(2, 3, False), "elsewhere": Tiling(2, 2, True)}
    kinds = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_tensors(path, kinds, arrays.values(), cut)
    file = TensorFile(path)
    assert file.tensors["stack"].stored == (3, 4, 2, 4, 3) and file.tensors["bias"].tiling is None
    for name, array in arrays.items():
        assert np.array_equal(file[name], array) and np.array_equal(file.read(name), array)
        assert np.array_equal(file.some(name, [2, 0]), array[[2, 0]])
        assert np.array_equal(file.read(name, 1), array[1])
        assert array.ndim == 1 or np.array_equal(file.layer(name, -1), array[-1])
        index = (slice(1, 3), slice(2, 5))[: array.ndim]
        assert np.array_equal(file.part(name, index), array[index])
        assert np.array_equal(file.part(name, index, [2, 1, 0]), array[[2, 1, 0]][index])
        assert file.part(name, (), []).shape == (0, *array.shape[1:])
    ends = headers.units_of(path)
    assert ends[-1] == path.stat().st_size and ends == sorted(set(ends))


def test_tiles_that_do_not_make_the_shape_are_refused(tmp_path: Path) -> None:
    path, value = tmp_path / "m.safetensors", np.zeros((4, 6), np.float32)
    write_tensors(path, [("w", value.dtype, value.shape)], [value], {"w": Tiling(2, 3, False)})
    good = path.read_bytes()
    for wrong in (b"[2, 2, false]", b"[0, 3, false]", b"[2, 3, 0]    "):
        path.write_bytes(good.replace(b"[2, 3, false]", wrong))
        with pytest.raises(UserError, match=r"m.safetensors has no valid safetensors header"):
            TensorFile(path)
    assert tiles.read({}) == {} and tiles.written({}) == {}


def test_units_are_tiles_and_matrices_and_small_tensors_together(tmp_path: Path) -> None:
    path, large, small = tmp_path / "m.safetensors", np.zeros((2, 256, 512), np.float32), np.zeros(10, np.float32)
    kinds = [("a", large), ("b", small), ("c", small), ("d", large), ("e", small)]
    tensors = [(name, array.dtype, array.shape) for name, array in kinds]
    write_tensors(path, tensors, [array for _, array in kinds], {"d": Tiling(2, 2, False)})
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    sizes = np.diff([0, *headers.units_of(path)]).tolist()
    assert sizes == [start, *[2**19] * 2, 80, *[2**17] * 8, 40]
    write_tensors(path, [("a", np.dtype(np.float32), (1, 2**19 + 1))], [np.zeros((1, 2**19 + 1), np.float32)])
    assert np.diff([0, *headers.units_of(path)]).tolist()[1:] == [2**20, 2**20, 4], "none is longer than a MiB"
    path.write_bytes((10**6).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="has no valid safetensors header"):
        headers.units_of(path)
