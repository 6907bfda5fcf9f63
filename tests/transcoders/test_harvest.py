"""Prompts, rows and the shuffle buffer: who sees what, in which order, and that it is what the model computed."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from difffract_jax.address import IMAGE, TEXT, Layout, Stack
from difffract_jax.config import UserError
from difffract_jax.models.pipeline import encode, model_velocity, plan_run, sample, step_inputs
from difffract_jax.models.stacks import run_stacks
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders.harvest import Chunk, Sampler, at_sites, collect_rows
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.prompts import PromptFile, PromptWorld, in_validation, read_prompts, split_prompts
from difffract_jax.transcoders.sites import parse_sites, sites_of
from difffract_jax.transcoders.store import open_store, write_store
from tolerances import TOL, relative_error

ALL = sites_of({"img": (0, 2), "txt": (1,), "joint": (0, 1)})


def caption(number: int) -> str:
    return f"a {('red', 'green', 'blue')[number % 3]} thing number {number // 3}"


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


def sampler(pipe, sites=ALL, **more):
    run = plan_run(pipe.config, steps=2, height=16, width=24, text_tokens=40)
    return Sampler(pipe, sites, run, PromptWorld(caption, "train", 0.1), seed=3, prompts_at_once=2, **more)


def test_rows_are_what_the_model_computes(pipe):
    source = sampler(pipe)
    chunk = source.chunk(1)
    prompt = source.prompts(3)  # the second of chunk 1
    encoded = encode(pipe, prompt, 40)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(3), 3), (6, 16))
    z = sample(model_velocity, pipe.transformer, source.run, encoded, noise, stop=1)
    h, cond = pipe.transformer.embed(step_inputs(source.run, encoded, z, 1), source.run.grid)
    _, (double, single) = run_stacks(
        pipe.transformer.stacks, h, cond, tap=lambda visit: (visit.acts.mlp_in, visit.acts.mlp_out)
    )
    tokens = int(encoded.mask.sum())
    for group, layers, live in (
        ("img", (0, 2), [a.img[np.array([0, 2])] for a in double]),
        ("txt", (1,), [a.txt[1:2, :tokens] for a in double]),
        ("joint", (0, 1), [jnp.concatenate([a[:, :tokens], a[:, 40:]], axis=1) for (a,) in single]),
    ):
        count = live[0].shape[1]
        rows, valid = chunk.rows[group], chunk.valid[group].reshape(2, 2, -1)
        places = rows.t.shape[0] // 4
        here = np.flatnonzero(valid[1, 1]) + 3 * places
        assert len(here) == count and np.all(rows.t[here] == 0.5)
        for ours, expected in zip(rows[:2], live, strict=True):
            assert ours.shape[0] == len(layers)
            assert relative_error(sorted_rows(ours[:, here]), sorted_rows(expected)) <= TOL.f32_block


def test_sites_of_several_stacks_are_taken_in_the_order_of_their_numbers():
    layout = Layout((Stack("pairs", 2, (IMAGE, TEXT)), Stack("alone", 3, (IMAGE,))))
    reports = [jnp.arange(2), 10 + jnp.arange(2), 20 + jnp.arange(3)]
    taken = at_sites(reports, sites_of({"img": (1, 2, 4), "txt": (0,)}), layout)
    assert {name: rows.tolist() for name, rows in taken.items()} == {"img": [1, 20, 22], "txt": [10]}


def sorted_rows(a):
    """Rows of each site in the order of their first channel: a chunk has its tokens in random order."""
    a = np.asarray(a)
    return np.stack([site[np.argsort(site[:, 0])] for site in a])


def test_padding_counts_only_where_it_is_asked_for(pipe):
    without, with_padding = (sampler(pipe, include_padding=p).chunk(0) for p in (False, True))
    words = [int(encode(pipe, sampler(pipe).prompts(n), 40).mask.sum()) for n in (0, 1)]
    assert without.valid["txt"].sum() == 2 * sum(words) and with_padding.valid["txt"].all()
    assert without.valid["joint"].sum() == 2 * (sum(words) + 2 * 6)


def test_few_tokens_are_a_random_subset_and_an_sae_reads_what_it_returns(pipe):
    every, few = sampler(pipe).chunk(0), sampler(pipe, tokens_per_step=3, sae=True).chunk(0)
    assert all(np.array_equal(rows.x, rows.y) for rows in few.rows.values())
    assert few.valid["txt"].all() and few.rows["txt"].t.shape == (2 * 2 * 3,)
    found = {tuple(row) for row in np.asarray(few.rows["txt"].y[0]).round(4)}
    assert len(found) == 12 and found <= {tuple(row) for row in np.asarray(every.rows["txt"].y[0]).round(4)}


def test_chunks_are_the_same_whenever_they_are_made_and_on_every_mesh(pipe):
    first = sampler(pipe).chunk(2)
    mesh = make_mesh({"data": 2})
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for again, bound in ((sampler(pipe).chunk(2), 0), (sampler(pipe, spread=spread).chunk(2), TOL.sharded)):
        for name, rows in first.rows.items():
            assert relative_error(again.rows[name].y, rows.y) <= bound
            assert np.array_equal(again.valid[name], first.valid[name])


class Numbers:
    """A source whose rows say where they come from: y = 1000 * chunk + number in the chunk."""

    sites, width = sites_of({"img": (0, 1), "txt": (4,)}), 2

    def chunk(self, number):
        rows, valid = {}, {}
        for name, count in (("img", 8), ("txt", 3)):
            value = 1000.0 * number + jnp.arange(8)
            y = jnp.broadcast_to(value[None, :, None], (len(self.sites.groups[name]), 8, 2))
            rows[name], valid[name] = ActivationRows(-y, y, value), np.arange(8) < count
        return Chunk(rows, valid)


def serve(store, position, plan):
    """The rows of a round, as numbers [site, batch, row]."""
    orders = buffers.serving_orders(buffers.groups_of(store), plan, position)
    cut = [{n: o[b * plan.batch :][: plan.batch] for n, o in orders.items()} for b in range(plan.round_batches)]
    batches = [buffers.gather(store, places) for places in cut]
    assert all(np.array_equal(b.x, -b.y) and np.array_equal(b.y[:, :, 0], b.t) for b in batches)
    return np.stack([np.asarray(batch.t) for batch in batches], axis=1)


def test_the_buffer_serves_each_row_once_and_replaces_what_it_served():
    source = Numbers()
    plan = buffers.plan_buffer(32, 4, 0.5, seed=0)
    store = buffers.empty_store(source.sites, source.width, plan.capacity, jnp.float32, make_mesh({}))
    store, position = buffers.fill_store(store, source, plan)
    assert position == buffers.Position(chunk=4, round=0, served=0, counts=(32, 12))
    before = set(np.asarray(store["img"].t).tolist())
    served = serve(store, position, plan)
    assert served.shape == (3, 4, 4)
    img, txt = served[0].ravel(), served[2].ravel()
    assert np.array_equal(served[0], served[1]) and len(set(img)) == 16
    assert set(txt) == {1000.0 * c + n for c in range(4) for n in range(3)} and max(Counter(txt).values()) == 2
    assert len({number // 1000 for number in img[:8]}) > 1, "batches mix chunks"
    store, after = buffers.refresh(store, source, plan, position)
    assert after == buffers.Position(chunk=6, round=1, served=0, counts=(32, 18))
    now = set(np.asarray(store["img"].t).tolist())
    assert now == (before - set(img.tolist())) | {1000.0 * c + n for c in (4, 5) for n in range(8)}
    assert {4000.0, 5002.0, 0.0} <= set(np.asarray(store["txt"].t[:18]).tolist())


def test_a_buffer_that_could_not_fill_a_batch_is_refused():
    plan = buffers.plan_buffer(8, 4, 0.5, seed=0)
    store = buffers.empty_store(Numbers.sites, 2, plan.capacity, jnp.float32, make_mesh({}))
    with pytest.raises(UserError, match="The txt sites have 3 rows when the buffer is full, fewer than one batch of 4"):
        buffers.fill_store(store, Numbers(), plan)
    with pytest.raises(UserError, match="buffer_rows must be at least batch, 16, but is 8"):
        buffers.plan_buffer(8, 16, 0.5, seed=0)


def test_a_store_gives_back_the_rows_of_both_splits(pipe, tmp_path):
    source = sampler(pipe, sites=sites_of({"img": (0,), "txt": (1,)}))
    record = write_store({"train": source, "validation": source}, {"train": 3, "validation": 1}, tmp_path / "s", {})
    assert [len(record["rows"][split]) for split in ("train", "validation")] == [3, 1]
    stored = open_store(tmp_path / "s", "train", seed=0)
    assert (stored.sites, stored.width) == (source.sites, TINY.d_model)
    for group in ("img", "txt"):
        ours, direct = (collect_rows(s, group, range(3)) for s in (stored, source))
        assert relative_error(sorted_rows(ours.y), sorted_rows(direct.y)) <= TOL.f32_block
        assert sorted(np.asarray(ours.t)) == sorted(np.asarray(direct.t))
    shard = tmp_path / "s" / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="train-00001.safetensors is cut off by 100 bytes"):
        collect_rows(stored, "img", range(3))
    shard.unlink()
    with pytest.raises(UserError, match="lacks shards of the train split"):
        open_store(tmp_path / "s", "train", seed=0)


def test_a_failed_harvest_leaves_nothing(tmp_path):
    class Failing(Numbers):
        def chunk(self, number):
            if number:
                raise OSError(28, "No space left on device")
            return super().chunk(number)

    with pytest.raises(OSError, match="No space left"):
        write_store({"train": Failing()}, {"train": 2}, tmp_path / "s", {})
    assert not list(tmp_path.iterdir())


def test_no_prompt_is_on_both_sides_and_every_epoch_has_all():
    prompts = [caption(n % 150) for n in range(300)]
    sides = split_prompts(prompts, 0.3, seed=1)
    train, validation = (set(side.prompts) for side in sides.values())
    assert not train & validation and train | validation == set(prompts) and 20 < len(validation) < 80
    side = sides["train"]
    epochs = [[side(n) for n in range(e * len(side.prompts), (e + 1) * len(side.prompts))] for e in (0, 1)]
    assert epochs[0] != epochs[1] and Counter(epochs[0]) == Counter(epochs[1]) == Counter(side.prompts)
    assert side(5) == PromptFile(side.prompts, 1)(5)


def test_a_world_keeps_its_sides_apart():
    sides = [PromptWorld(caption, split, 0.2) for split in ("train", "validation")]
    train, validation = ({side(n) for n in range(40)} for side in sides)
    assert not train & validation and len(train) == 40
    assert all(in_validation(prompt, 0.2) for prompt in validation)
    with pytest.raises(UserError, match="None of 4096 captions belongs to validation"):
        PromptWorld(lambda n: "always the same", "validation", 1e-9)(0)


def test_files_of_every_kind_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("a fox\n\n  a \u00fcber-lemon \n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": "a fox", "id": 3}) + "\n" + json.dumps("a lemon") + "\n")
    assert read_prompts(str(tmp_path / "a.txt")) == ["a fox", "a \u00fcber-lemon"]
    assert read_prompts(str(tmp_path / "a.jsonl")) == ["a fox", "a lemon"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"\n \n", "holds no prompts"),
        ("binary.txt", b"\xff\xfe\x00\x01", "is binary, no text"),
        ("zeros.txt", b"a\x00b\n", "is binary, no text"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "Line 2 of .* is not valid JSON"),
        ("fields.jsonl", b'{"title": "a"}\n', "Line 1 of .* has no field prompt, caption, text"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(str(tmp_path / name))


def test_missing_files_and_extras_are_told(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no.txt is not a file of prompts"):
        read_prompts(str(tmp_path / "no.txt"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module, source in (("pyarrow.parquet", tmp_path / "a.parquet"), ("datasets", "hf:someone/captions")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"Reading {source} needs the extra `data`"):
            read_prompts(str(source))


def test_parquet_files_are_read_and_broken_ones_refused(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "caption": ["a fox", None, " a lemon"]}), path)
    assert read_prompts(str(path)) == ["a fox", "a lemon"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet \(.*\); write or copy the file again"):
        read_prompts(str(path))
    parquet.write_table(pyarrow.table({"title": ["a fox"]}), path)
    with pytest.raises(UserError, match="has the columns title; one must be prompt, caption, text"):
        read_prompts(str(path))


class Columns(dict):
    """What `datasets.load_dataset` returns, as far as it is read."""

    column_names = property(list)


def test_datasets_are_read_and_missing_ones_told(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist\non the Hub")
        return Columns(title=["x", "y"], text=["a fox", "a lemon"])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("hf:someone/captions") == ["a fox", "a lemon"]
    assert read_prompts("hf:someone/captions:test:title") == ["x", "y"]
    assert asked == [("someone/captions", "train"), ("someone/captions", "test")]
    with pytest.raises(UserError, match=r"The dataset no/such could not be read \(Dataset 'no/such' doesn't exist on"):
        read_prompts("hf:no/such")
    for model in ("hf:someone/flux@main", "hf:someone/flux/transcoders"):
        with pytest.raises(UserError, match="is written like a model on the hub; a data set of prompts is"):
            read_prompts(model)
    monkeypatch.setattr(Columns, "column_names", ["title"])
    with pytest.raises(UserError, match="has the columns title; write hf:someone/captions:train:COLUMN"):
        read_prompts("hf:someone/captions")


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["*/*"], "img/0 img/1 img/2 txt/0 txt/1 txt/2 single/0 single/1"),
        (["img/0-1", "single/1"], "img/0 img/1 single/1"),
        (["txt/*", "txt/2"], "txt/0 txt/1 txt/2"),
    ],
)
def test_sites_are_read_from_patterns(patterns, names):
    assert parse_sites(patterns, TINY.layout).names == tuple(names.split())


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (
            "img/7",
            "site img/7 does not exist: the model has img/0 to img/2 and txt/0 to txt/2 and single/0 to single/1",
        ),
        ("mlp/1", "'mlp/1' names no sites"),
        ("img/2-1", "name no block of this model"),
    ],
)
def test_sites_that_do_not_exist_are_refused(pattern, told):
    with pytest.raises(UserError, match=told):
        parse_sites([pattern], TINY.layout)
