"""Prompts, rows and the shuffle buffer: who sees what, in which order, and that it is what the model computed."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difffract_jax.address import IMAGE, TEXT, Layout, Stack
from difffract_jax.config import UserError
from difffract_jax.models.mmdit import Inputs
from difffract_jax.models.pipeline import encode, encode_run, model_velocity, plan_run, sample, step_inputs
from difffract_jax.models.stacks import run_stack, run_stacks
from difffract_jax.models.tiny import TINY, random_pipeline
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import buffer as buffers
from difffract_jax.transcoders import text_encoders
from difffract_jax.transcoders.harvest import Chunk, Sampler, by_group, collect_rows, site_layers
from difffract_jax.transcoders.objective import ActivationRows
from difffract_jax.transcoders.prompts import PromptFile, PromptWorld, in_validation, split_prompts
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import parse_sites, sites_of
from difffract_jax.transcoders.sources import open_sampler
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


@pytest.mark.slow
def test_with_guidance_by_two_branches_both_evaluations_give_rows(pipe):
    run = plan_run(pipe.config, steps=2, height=16, width=24, text_tokens=40)
    run = run._replace(guidance=2.5, two_branches=True, negative_prompt="a grey thing")
    prompts = PromptWorld(caption, "train", 0.1)
    negative = encode(pipe, run.negative_prompt, 40)
    source = Sampler(pipe, ALL, run, prompts, seed=3, prompts_at_once=2, negative=negative)
    chunk = source.chunk(1)
    encoded = encode_run(pipe, source.prompts(3), run)  # the second of chunk 1
    z = sample(model_velocity, pipe.transformer, run, encoded, source.noise(np.array([3]))[0], stop=1)
    places = {name: len(mask.ravel()) // 8 for name, mask in chunk.valid.items()}  # of 2 steps, branches and prompts
    for branch, one in enumerate(encoded.branches):
        h, cond = pipe.transformer.embed(step_inputs(run, one, z, 1), run.grid)
        _, (double, _) = run_stacks(pipe.transformer.stacks, h, cond, tap=lambda visit: visit.acts.mlp_in)
        tokens = int(one.mask.sum())
        begin = (4 + 2 * branch + 1) * places["txt"]
        assert chunk.valid["txt"][begin : begin + places["txt"]].sum() == tokens
        rows = chunk.rows["txt"].x[0, begin : begin + places["txt"]][:tokens]
        order = np.lexsort(np.asarray(rows).T)
        theirs = np.asarray(double[1][1][:tokens])
        assert relative_error(np.asarray(rows)[order], theirs[np.lexsort(theirs.T)]) <= TOL.f32_block


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
    sites = sites_of({"img": (1, 2, 4), "txt": (0,)})
    assert site_layers(sites, layout) == ((1,), (0,), (0, 2))
    taken = by_group([jnp.array([1]), jnp.array([10]), jnp.array([20, 22])], sites, layout)
    assert {name: rows.tolist() for name, rows in taken.items()} == {"img": [1, 20, 22], "txt": [10]}


@pytest.mark.parametrize("kept", [((0, 2), (1,)), ((2,), ()), ((0, 1, 2), (0, 1, 2))], ids=str)
def test_reports_that_are_kept_are_those_of_all_blocks(pipe, kept):
    stack, config = pipe.transformer.double, pipe.config.transformer
    deep = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 2 * leaf[:1]])[:3], stack)
    h = tuple(jax.random.normal(jax.random.key(n), (6, config.d_model)) for n in (0, 1))
    empty = jnp.zeros((6, config.text_width)), jnp.zeros(config.pooled_width), jnp.float32(0.5)
    inputs = Inputs(jnp.zeros((6, config.in_channels)), *empty)
    _, cond = pipe.transformer.embed(inputs, (2, 3))

    def tap(visit):
        return tuple(visit.acts.mlp_out)

    after, every = run_stack(deep, h, cond, tap=tap)
    ours, some = run_stack(deep, h, cond, tap=tap, kept=kept)
    assert all(relative_error(a, b) <= TOL.f32_block for a, b in zip(ours, after, strict=True))
    for numbers, report, expected in zip(kept, some, every, strict=True):
        if numbers:
            assert relative_error(report, expected[np.array(numbers)]) <= TOL.f32_block
        else:
            assert report is None


def test_text_encoders_on_the_host_are_sent_for_many_chunks_and_give_the_same(pipe, monkeypatch):
    monkeypatch.setattr(text_encoders, "CHUNKS", 2)
    settings = TrainConfig(model="m", prompts="world", height=16, width=24, text_tokens=40, steps_per_image=2)
    settings = settings.model_copy(update={"prompts_at_once": 2})
    here, there = (open_sampler(settings, pipe, "train", caption=caption, encoders_on_host=h) for h in (False, True))
    assert there.pipe.t5 is None and there.pipe.clip is None and there.pipe.vae is None
    held = jax.tree.leaves(there.encoders._encoders)
    assert {leaf.sharding.memory_kind for leaf in held} == {"pinned_host"}
    for number in (0, 1, 2, 7, 7):
        expected, ours = here.chunk(number).rows, there.chunk(number).rows
        for name, rows in expected.items():
            assert all(map(np.array_equal, ours[name], rows)), (number, name)
    assert sorted(there.encoders._made) == [8], "what was encoded ahead waits, what was served is gone"


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


def test_a_list_of_fewer_prompts_than_processes_is_refused(pipe, tmp_path, monkeypatch):
    (tmp_path / "few.txt").write_text("".join(f"{caption(n)}\n" for n in range(9)), encoding="utf-8")
    settings = TrainConfig(model="m", prompts=str(tmp_path / "few.txt"), validation_share=0.4)
    sides = split_prompts([caption(n) for n in range(9)], 0.4, 0)
    monkeypatch.setattr(jax, "process_count", lambda: len(sides["train"].prompts) + 1)
    with pytest.raises(
        UserError, match=r"few.txt has (\d+) prompts for train, fewer than the \d+ processes that share"
    ):
        open_sampler(settings, pipe, "train")


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
