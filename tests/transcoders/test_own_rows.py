"""Rows of any origin: which files hold them, what is refused, how they are split and served, and that they train."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from difffract_jax.config import UserError
from difffract_jax.conversion import convert_transcoders
from difffract_jax.loading import load_transcoders, save_transcoders
from difffract_jax.models.tiny import TINY
from difffract_jax.transcoders import own_rows
from difffract_jax.transcoders.exporting import newest_transcoders
from difffract_jax.transcoders.from_rows import train
from difffract_jax.transcoders.own_rows import BLOCK_ROWS, open_rows, rows_of
from difffract_jax.transcoders.row_evaluation import evaluate_rows, times_of
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.store import StoredRows
from difffract_jax.transcoders.transcoder import check_fit

X, Y = 6, 4


def make(count, seed=0, timed=True):
    """Rows y = tanh(A x) with A [6, 4], and times 1 and 0.5."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, X), np.float32)
    y = np.tanh(x @ np.random.default_rng(9).standard_normal((X, Y)).astype(np.float32)) + np.float32(0.2)
    return (x, y, rng.choice(np.float32([1, 0.5]), count)) if timed else (x, y)


def write(directory, kind, rows, name="a"):
    directory.mkdir(exist_ok=True)
    arrays = dict(zip("xyt", rows, strict=False))
    if kind == "npy":
        for what, array in arrays.items():
            np.save(directory / f"{what}.npy", array)
    elif kind == "named npy":
        for what, array in arrays.items():
            np.save(directory / f"{what}_{name}.npy", array)
    elif kind == "npz":
        np.savez(directory / f"{name}.npz", **arrays)
    else:
        save_file(arrays, directory / f"{name}.safetensors")
    return directory


def served(source, chunks):
    """All valid rows of some chunks, side by side: x, y, t."""
    parts = []
    for number in chunks:
        chunk = source.chunk(number)
        keep, rows = chunk.valid["rows"], chunk.rows["rows"]
        parts.append(np.concatenate([rows.x[0][keep], rows.y[0][keep], np.asarray(rows.t)[keep, None]], axis=1))
    return np.concatenate(parts)


def ordered(rows):
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("kind", ["npy", "named npy", "npz", "safetensors"])
def test_every_layout_gives_its_rows_once_an_epoch_and_in_a_new_order(tmp_path, kind):
    parts = [make(30)] if kind == "npy" else [make(20, 1), make(10, 2)]
    for number, part in enumerate(parts):
        write(tmp_path / "rows", kind, part, f"s{number}")
    source = open_rows(tmp_path / "rows", None, 0.5, 0)
    assert (source.width, source.timed, source.sites.names) == ((X, Y), True, ("rows/0",))
    whole = np.concatenate([np.concatenate([x, y, t[:, None]], axis=1) for x, y, t in parts])
    epoch = range(len(source.blocks))
    assert np.array_equal(ordered(served(source, epoch)), ordered(whole))
    assert np.array_equal(served(source, epoch), served(open_rows(tmp_path / "rows", None, 0.5, 0), epoch))


def test_validation_is_the_end_of_every_shard_and_training_never_sees_it(tmp_path):
    for number, count in enumerate((2500, 40)):
        write(tmp_path / "rows", "npz", make(count, number, timed=False), f"s{number}")
    train_rows, held_out = (open_rows(tmp_path / "rows", split, 0.1, 0) for split in ("train", "validation"))
    sizes = [[block.end - block.begin for block in source.blocks] for source in (train_rows, held_out)]
    assert sizes == [[1024, 1024, 202, 36], [250, 4]]
    assert [(block.begin, block.end) for block in held_out.blocks] == [(2250, 2500), (36, 40)]
    assert train_rows.chunk(0).valid["rows"].size == BLOCK_ROWS and not train_rows.timed
    assert np.all(np.asarray(train_rows.chunk(0).rows["rows"].t) == 0)
    orders = [[int(train_rows.chunk(n).valid["rows"].sum()) for n in range(4 * e, 4 * e + 4)] for e in range(4)]
    assert all(sorted(order) == [36, 202, 1024, 1024] for order in orders) and len({*map(tuple, orders)}) > 1


def test_narrow_types_are_read_as_float32():
    x, y, t = make(10)
    for kind in (np.float16, np.float64, ml_dtypes.bfloat16):
        rows = served(rows_of((x.astype(kind), y, t), None, 0.5, 0), [0])
        assert np.array_equal(ordered(rows)[:, :X], ordered(np.c_[x.astype(kind).astype(np.float32), y, t])[:, :X])


def bad(**change):
    rows = dict(zip("xyt", make(10), strict=True)) | change
    return {name: array for name, array in rows.items() if array is not None}


def with_value(array, row, value):
    array = array.copy()
    array[row] = value
    return array


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (bad(y=make(9)[1]), "has 10 rows of x but 9 of y; row i of each must be of the same moment"),
        (bad(t=make(9)[2]), "has 10 rows of x but 9 of t"),
        (bad(x=with_value(make(10)[0], 3, np.nan)), "x of .* is not finite in row 3"),
        (bad(y=with_value(make(10)[1], 7, np.inf)), "y of .* is not finite in row 7"),
        (bad(x=make(10)[0].astype(np.float64) * 1e300), "x of .* is not finite in row 0"),
        (bad(t=with_value(make(10)[2], 4, 1.5)), r"t of .* is 1.5 in row 4, but times lie in \[0, 1\]"),
        (bad(t=with_value(make(10)[2], 4, -0.1)), r"t of .* is -0.1 in row 4"),
        (bad(t=with_value(make(10)[2], 4, np.nan)), "t of .* is not finite in row 4"),
        (bad(x=make(10)[0][:, :, None]), r"x of .* has shape \[10, 6, 1\], but must be \[rows, channels\]"),
        (bad(y=make(10)[1][:, 0]), r"y of .* has shape \[10\], but must be \[rows, channels\]"),
        (bad(t=make(10)[2][:, None]), r"t of .* has shape \[10, 1\], but must be \[rows\]"),
        (bad(x=np.ones((10, X), int)), "x of .* holds int64; rows must be floating-point numbers"),
        (bad(x=np.ones((10, X), complex)), "x of .* holds complex128"),
        (bad(x=np.zeros((0, X)), y=np.zeros((0, Y)), t=np.zeros(0)), r"x of .* is empty, of shape \[0, 6\]"),
        (bad(x=np.zeros((10, 0))), r"x of .* is empty, of shape \[10, 0\]"),
        (bad(y=None), "holds no array y; rows are x, y and, if wanted, t"),
    ],
)
def test_rows_that_are_none_are_one_sentence_from_files_and_from_python(tmp_path, rows, said):
    write(tmp_path / "rows", "npz", rows.values())
    np.savez(tmp_path / "rows" / "a.npz", **rows)
    for given in (tmp_path / "rows", rows):
        with pytest.raises(UserError, match=said) as error:
            rows_of(given, "train", 0.1, 0)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_directories_that_hold_no_rows_are_one_sentence(tmp_path):
    rows = tmp_path / "rows"
    with pytest.raises(UserError, match=r"rows is not a directory of rows: .* give a directory with x.npy, y.npy"):
        open_rows(rows, "train", 0.1, 0)
    rows.mkdir()
    (rows / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no config.json of harvested rows and no arrays"):
        open_rows(rows, "train", 0.1, 0)
    for name, data in (("a.npz", b"PK\x03\x04"), ("x.npy", b"\x93NUMPY"), ("a.safetensors", b"12345678")):
        (rows / name).write_bytes(data)
        with pytest.raises(UserError, match=name) as error:
            open_rows(rows, "train", 0.1, 0)
        assert "\n" not in str(error.value)
        (rows / name).unlink()
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n"
    (rows / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16))
    with pytest.raises(UserError, match="x.npy cannot be read as a NumPy array of numbers"):
        open_rows(rows, "train", 0.1, 0)
    (rows / "x.npy").unlink()
    write(rows, "npz", make(10))
    np.savez(rows / "b.npz", x=np.ones((4, 5)), y=np.ones((4, Y)), t=np.ones(4))
    with pytest.raises(UserError, match="x has 6 channels in .*a.npz but 5 in .*b.npz"):
        open_rows(rows, "train", 0.1, 0)
    np.savez(rows / "b.npz", x=np.ones((4, X)), y=np.ones((4, Y)))
    with pytest.raises(UserError, match="a.npz has times t, but .*b.npz has none"):
        open_rows(rows, "train", 0.1, 0)


def batches(sizes, timed=True):
    for number, size in enumerate(sizes):
        yield make(size, number, timed)


@pytest.mark.parametrize("again", [True, False])
def test_batches_of_any_size_are_served_in_their_order_epoch_after_epoch(again):
    sizes = (700, 1, 900, 600)
    whole = np.concatenate([np.concatenate([x, y, t[:, None]], axis=1) for x, y, t in batches(sizes)])
    source = rows_of((lambda: batches(sizes)) if again else batches(sizes), "train", 0.1, 0)
    assert np.array_equal(served(source, range(3)), whole) and source.width == (X, Y)
    assert np.array_equal(served(source, range(3, 6)), whole)
    late = rows_of((lambda: batches(sizes)) if again else batches(sizes), "train", 0.1, 0)
    assert np.array_equal(served(late, [4]), whole[1024:2048]), "a resumed run passes over what came before"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (iter(()), "The iterator of rows gives no batch"),
        ([np.ones((2, 3))] * 4, r"Batch 0 of the rows must be a pair \(x, y\) or a triple"),
        ([make(5), make(5, timed=False)], "batch 0 of the rows has times t, but batch 1 of the rows has none"),
        ([make(5), (np.full((2, X), np.nan), np.ones((2, Y)), np.ones(2))], "x of batch 1 of the rows is not finite"),
        (3, "Rows cannot be read from a int"),
    ],
)
def test_batches_that_are_none_are_one_sentence(rows, said):
    with pytest.raises(UserError, match=said):
        rows_of(rows, "train", 0.1, 0).chunk(0)


def test_an_sae_reads_what_it_returns():
    x, y, t = make(10)
    source = rows_of((x, y, t), None, 0.5, 0, sae=True)
    assert source.width == (Y, Y)
    assert np.array_equal(ordered(served(source, [0])), ordered(np.c_[y, y, t]))


def test_iterators_that_end_too_early_are_one_sentence(monkeypatch):
    once = iter([list(batches([2000]))])
    source = rows_of(lambda: iter(next(once, [])), "train", 0.1, 0)
    served(source, range(2))
    with pytest.raises(UserError, match="returned an empty iterator; return a new one each time"):
        source.chunk(2)
    monkeypatch.setattr(own_rows, "KEPT_BYTES", 1000)
    source = rows_of(batches([2000]), "train", 0.1, 0)
    served(source, range(2))
    with pytest.raises(UserError, match="The iterator of rows ended after .* GiB, more than is kept"):
        source.chunk(2)


SMALL = {"steps": 6, "batch": 32, "buffer_rows": 128, "expansion": 2, "k": 3, "time_embed": 4, "log_every": 3}
SMALL |= {"checkpoint_every": 3, "warmup": 1, "lr": 3e-3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on a directory of rows 6 to 4 channels wide; its directory, that of the rows, and how it ended."""
    out = tmp_path_factory.mktemp("foreign")
    write(out / "rows", "npz", make(600))
    return out / "run", out / "rows", train(rows=out / "rows", out=out / "run", skip=True, **SMALL)


def test_rows_of_two_widths_train_save_load_and_are_measured(run, tmp_path):
    out, rows, done = run
    shape = done.transcoders.config
    assert (shape.d_model, shape.d_model_out, shape.features, shape.activation) == (X, Y, 2 * X, "jumprelu")
    assert np.isfinite(done.metrics["fvu"]) and done.step == 6
    assert "6 to 4" in repr(done.transcoders)
    save_transcoders(done.transcoders, tmp_path / "saved")
    loaded = load_transcoders(tmp_path / "saved")
    assert loaded.config == shape and loaded.sites.names == ("rows/0",)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["config"]["d_out"] == Y
    result = evaluate_rows(loaded, rows)
    assert [row["site"] for row in result.sites] == ["rows/0"] and result.sigmas == [1.0, 0.5]
    x, y, t = make(600)
    guess, tc = np.zeros((40, Y)), jax.tree.map(lambda a: a[0], loaded.stacks["rows"])
    for time in (1, 0.5):
        guess[t[:40] == time] = tc(jnp.asarray(x[:40][t[:40] == time]), jnp.float32(time))
    few = evaluate_rows(loaded, (x[:40], y[:40], t[:40])).sites[0]
    variance = sum(np.sum((y[:40][at] - y[:40][at].mean(0)) ** 2) for at in (t[:40] == 1, t[:40] == 0.5))
    assert abs(few["fvu"] - np.sum((y[:40] - guess) ** 2) / variance) <= 1e-4 * few["fvu"]
    assert result.summary().keys() == {"fvu", "l0", "dead"}


def test_a_checkpoint_exports_the_transcoders_of_its_step(run):
    out, _, done = run
    made = newest_transcoders(out)
    assert (made.step, made.record["step"], made.record["settings"]["steps"]) == (6, 6, 6)
    for a, b in zip(*(jax.tree.leaves(one.stacks) for one in (made.transcoders, done.transcoders)), strict=True):
        assert np.array_equal(a, b)


def test_transcoders_of_rows_fit_no_model_and_no_pt_file(run, tmp_path):
    tcs = run[2].transcoders
    with pytest.raises(UserError, match="The transcoders are 6 to 4 wide, but the model is 32 wide"):
        check_fit(tcs, TINY)
    save_transcoders(tcs, tmp_path / "saved")
    with pytest.raises(UserError, match=r"cannot be written as `.pt` files, as they have .*6 channels in and 4 out"):
        convert_transcoders(tmp_path / "saved", tmp_path / "pt", to_torch=True)
    assert not (tmp_path / "pt").exists()
    with pytest.raises(UserError, match="The rows are 4 to 6 channels wide, but the transcoder 6 to 4"):
        evaluate_rows(tcs, make(10)[1::-1])
    with pytest.raises(UserError, match="These rows were harvested from a model's sites; give arrays"):
        evaluate_rows(tcs, StoredRows(tmp_path, "train", 0, tcs.sites, 6, ({"img": 1},)))


def test_a_run_on_batches_goes_on_where_it_stopped(tmp_path):
    choices = SMALL | {"rows": lambda: batches([200] * 3), "skip": True}
    whole = train(out=tmp_path / "whole", **choices)
    stopped = train(out=tmp_path / "run", **choices, max_minutes=1e-9)
    assert (stopped.step, stopped.transcoders) == (1, None)
    resumed = train(out=tmp_path / "run", **choices, resume=True)
    assert resumed.step == 6 and whole.transcoders.source == resumed.transcoders.source


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give either `rows` or a `source`"),
        ({"rows": make(10), "stepz": 3}, "`stepz` is not a setting; did you mean `steps`"),
        ({"settings": TrainConfig(), "rows": make(10), "steps": 3}, "steps: choices and `settings` exclude each other"),
    ],
)
def test_calls_that_make_no_sense_are_one_sentence(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        train(**given)
    assert not list(tmp_path.iterdir())


def test_many_times_are_sorted_into_equal_parts():
    x, y, _ = make(200)
    rows = rows_of((x, y, np.linspace(0, 1, 200)), None, 0.5, 0)
    assert times_of(rows) == [0.9375, 0.8125, 0.6875, 0.5625, 0.4375, 0.3125, 0.1875, 0.0625]
