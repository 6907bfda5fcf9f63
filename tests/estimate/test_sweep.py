"""Sweeps over TPU slices: what is modelled is what compiled programs say, and what cannot be read is refused.

Programs are compiled for the virtual devices: their bytes and exchanges hang on mesh and shapes, not on the chip.
"""

from math import prod

import jax
import pytest

from difffract_jax.cli.models import work_of
from difffract_jax.config import UserError
from difffract_jax.estimate.roofline import Seconds, exchange_seconds, price
from difffract_jax.estimate.step_model import Cost, chunk_cost
from difffract_jax.estimate.sweep import abstract_setup, lay_out, parse_sweep, sweep, with_compiled
from difffract_jax.estimate.sweep_report import sweep_markdown, sweep_rows
from difffract_jax.sharding import MESH_AXES, make_mesh
from difffract_jax.storage.checkpoint import leaf_paths
from difffract_jax.transcoders.chips import CHIPS, GIB, closes, hosts_of, slice_named
from difffract_jax.transcoders.compiled import Collective, collectives, moved
from difffract_jax.transcoders.plan import TrainingPlan, TrainingWorkload, open_topology
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import abstract_rows, abstract_state, set_up
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.step import jit_step

FOUR, WIDTH = sites_of({"img": (0, 1), "txt": (0, 1)}), 64
DOUBLE = {"img": range(19), "txt": range(19)}
SIZES = {"expansion": 8, "k": 4, "aux_k": 8, "time_embed": 16, "batch": 64, "buffer_rows": 256, "sites_at_once": "one"}
FLUX = {"expansion": 16, "k": 64, "aux_k": 1536, "batch": 4096, "buffer_rows": 131_072, "matmul": "bf16"}
ALONE = pytest.param({}, marks=pytest.mark.slow)
OTHERS = [
    {"data": 2},
    {"feature": 2},
    {"site": 2},
    {"data": 2, "feature": 2},
    {"feature": 8},
    {"site": 2, "feature": 4},
]


def work(sites=FOUR, width=WIDTH, **more) -> TrainingWorkload:
    settings = TrainConfig(**({"model": "m", "prompts": "p", "out": "o", "steps": 62_464} | SIZES | more))
    return TrainingWorkload(settings, sites, width, {})


def flux(groups, **more) -> TrainingWorkload:
    settings = TrainConfig(model="m", prompts="p", out="o", steps=62_464, model_dtype="bf16", **(FLUX | more))
    return TrainingWorkload(settings, sites_of(groups), 3072, {})


def modelled(asked: TrainingWorkload, shape: dict[str, int]):
    setup = abstract_setup(asked, dict.fromkeys(MESH_AXES, 1) | shape)
    return lay_out(asked, setup, abstract_state(setup))


@pytest.mark.parametrize(
    "shape",
    [
        {"data": 2, "site": 2, "feature": 2},
        ALONE,
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in OTHERS),
    ],
    ids=str,
)
def test_bytes_and_exchanges_are_those_of_the_compiled_step(shape):
    mesh = make_mesh(shape, jax.devices()[: prod(shape.values())])
    setup = set_up(work().settings.model_copy(update={"sparse_code": "off"}), FOUR, WIDTH, mesh)
    given = abstract_state(setup), abstract_rows(setup)
    compiled = jit_step(setup.recipe, mesh, given[0]).lower(*given).compile()
    layout = modelled(work(), shape)
    held = compiled.memory_analysis().argument_size_in_bytes
    assert held == layout.parts["state"] + layout.parts["rows"]
    found, counted = moved(collectives(compiled.as_text())), moved(list(layout.step.exchanged))
    assert counted.keys() <= found.keys()
    for kind, size in found.items():
        # What the model leaves out are scalars and the metrics of every site: of these `site` gathers 96 bytes.
        assert counted.get(kind, 0) == pytest.approx(size, rel=0.01, abs=100), kind


def test_a_training_without_time_or_dead_features_exchanges_less():
    whole = modelled(work(), {"feature": 2}).step.exchanged
    plain = modelled(
        work(conditioning="none", time_embed=0, activation="relu"), {"data": 2, "site": 2, "feature": 2}
    ).step.exchanged
    assert {one.kind for one in plain} == {"all-reduce"} < {one.kind for one in whole}
    assert modelled(work(), {"site": 4}).step.exchanged == ()


def test_loops_count_as_often_as_they_turn_and_what_stays_on_a_device_not_at_all():
    program = """
    HloModule step
    %body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
      %a = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%sum
      %b = f32[64]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%sum
    }
    %outer (p: (s32[], /*index=1*/f32[8])) -> (s32[], f32[8]) {
      %w = (s32[], f32[8]) while(%t), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
    }
    ENTRY %main (p: f32[8]) -> f32[8] {
      %w = (s32[], f32[8]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
      %c = f32[4]{0} conditional(%i, %t), branch_computations={%yes, %no}
      %g = f32[16]{0} all-gather(%w), replica_groups=[4,2]<=[8], dimensions={0}
    }
    %yes (p: f32[4]) -> f32[4] {
      %d = (f32[2]{0}, f32[2]{0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3}}
    }
    %unused (p: f32[4]) -> f32[4] {
      %e = f32[2]{0} all-reduce(%x), replica_groups={{0,1}}
    }
    """
    assert set(collectives(program)) == {
        Collective("all-reduce", 4, 32, 15),
        Collective("all-gather", 2, 64, 1),
        Collective("all-to-all", 2, 16, 1),
    }
    assert moved(collectives(program)) == {"all-gather": 64, "all-reduce": 480, "all-to-all": 16}


def test_a_sweep_begins_with_the_smallest_slice_that_holds_the_state():
    asked = parse_sweep("v5e:4..16,v5p:4,v6e:4..8")
    points, left_out = sweep(flux(DOUBLE), asked)
    assert [point.topology for point in points] == ["v5e:4x4", "v5p:2x2x1", "v6e:2x4"]
    assert points[2].parts["in between"] > points[2].parts["state"] / 3  # which v6e's compiler holds twice
    assert [one.topology for one in left_out] == ["v5e:2x2", "v5e:2x4", "v6e:2x2"]
    assert all(one.state > one.hbm for one in left_out)
    assert [point.fits for point in points] == [True, True, False]
    whole = points[1].parts["state"] * points[1].chips
    assert whole == pytest.approx(128 * GIB, rel=0.01)
    (point,), absent = sweep(flux(DOUBLE | {"joint": range(38)}), asked)
    assert point.topology == "v5p:2x2x1" and len(absent) == 5
    assert point.parts["state"] * point.chips == pytest.approx(257 * GIB, rel=0.01)


def test_more_chips_along_data_hold_the_same_state_and_less_of_all_else():
    grown = [modelled(flux(DOUBLE, sites_at_once="one"), {"data": data, "site": 2, "feature": 4}) for data in (1, 2, 8)]
    assert len({layout.parts["state"] for layout in grown}) == 1
    for part in ("rows", "buffer", "in between"):
        sizes = [layout.parts[part] for layout in grown]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1], part
    assert grown[0].changes == {} and grown[2].changes == {"prompts_at_once": 16}
    # By default all sites of a chip take their step together as soon as one's pre-activations are small: that is more.
    default = [modelled(flux(DOUBLE), {"data": data, "site": 2, "feature": 4}) for data in (1, 8)]
    assert default[1].parts["in between"] > 5 * default[0].parts["in between"]


def test_a_run_takes_as_long_as_its_parts_and_more_chips_take_no_longer():
    points, _ = sweep(flux(DOUBLE), parse_sweep("v5p:4..64"))
    for point in points:
        assert point.seconds >= max(point.run) and point.bound == point.run.bound
        assert point.chip_hours == pytest.approx(point.days * 24 * point.chips)
        assert point.tokens == pytest.approx(62_464 * 4096 / point.seconds)
        # Six products a row, feature and channel on both sides, at the peak of all chips.
        assert point.step.compute == pytest.approx(6 * 6144 * 49_152 * 4096 * 38 / (459e12 * point.chips))
    assert [point.seconds for point in points] == sorted((point.seconds for point in points), reverse=True)


def test_what_is_compiled_takes_the_place_of_what_is_modelled():
    (point,), _ = sweep(flux(DOUBLE), parse_sweep("v5p:4"))
    sizes = {"state": 1, "rows": 1, "buffer": 1, "model": 0, "arguments": 2, "outputs": 0, "temporaries": 7, "peak": 9}
    told = {"flops": 1.0, "compiled_flops": None, "communication": {}, "seconds": 1.0, "phases": {}}
    where = {"topology": point.topology, "chips": 4, "mesh": point.mesh, "hbm": point.hbm}
    found = with_compiled(point, TrainingPlan(**where, **sizes, **told, needed=point.hbm + 1, fits=False))
    assert found.compiled and not found.fits and found.needed == point.hbm + 1
    assert found.parts == point.parts | {"in between": 7} and found.seconds == point.seconds
    assert [row["memory"] for row in sweep_rows([point, found])] == ["modelled", "compiled"]


def test_a_chip_alone_exchanges_nothing():
    (point,), _ = sweep(flux({"img": range(3), "txt": range(3)}), parse_sweep("v5p:1"))
    titles, _, row = sweep_markdown([point]).splitlines()
    told = dict(zip(titles.split(" | "), row.split(" | "), strict=True))
    assert told["memory"] == "modelled" and told["fits"] == "yes" and told["mesh"] == "-"
    assert point.topology == "v5p:1x1x1" and point.communication == {} and point.step.network == 0


def test_links_that_close_to_a_ring_halve_the_time():
    v5e, size = CHIPS["v5e"], 10**9
    assert closes(v5e, 256, 16) and not closes(v5e, 64, 8) and closes(CHIPS["v5p"], 64, 4)
    assert not closes(CHIPS["v5p"], 16, 4)
    gathered, reduced = (
        exchange_seconds(Collective(kind, 16, size), v5e, 256) for kind in ("all-gather", "all-reduce")
    )
    assert reduced == pytest.approx(2 * gathered)
    assert gathered == pytest.approx(size * 15 / 16 / 100e9, rel=0.01)
    line = exchange_seconds(Collective("all-gather", 16, size), v5e, 128)
    assert closes(v5e, 128, 16) and line == gathered
    assert exchange_seconds(Collective("all-gather", 8, size), v5e, 8) == pytest.approx(size * 7 / 8 / 50e9, rel=0.01)
    assert exchange_seconds(Collective("all-reduce", 1, size), v5e, 8) == 0


def test_the_slowest_resource_is_the_bound():
    seconds = price(Cost(197e12, 819e9 / 2, (), sent=16e9 / 4), CHIPS["v5e"], 4)
    assert seconds == pytest.approx(Seconds(1, 0.5, 0, 0.25)) and seconds.bound == "compute" and seconds.longest == 1
    assert price(Cost(0, 0, (), prompts=9000), CHIPS["v6e"], 8).bound == "host"


def test_slices_have_as_many_chips_as_their_shape_says():
    for chip in CHIPS.values():
        for chips, shape in chip.slices.items():
            assert prod(map(int, shape.split("x"))) == chips
            assert hosts_of(chip, chips) == max(1, chips // chip.host_chips)
    assert slice_named(CHIPS["v5e"], 32) == "v5e:4x8"


def test_libtpu_knows_the_slices():
    pytest.importorskip("libtpu", reason="libtpu describes slices that are not here; pip install 'difffract_jax[tpu]'")
    for chip, chips in (("v5e", 16), ("v5p", 16), ("v6e", 8)):
        assert len(open_topology(slice_named(CHIPS[chip], chips)).devices) == chips


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v5q:4..8", "`v5q` is not a chip; did you mean `v5p`?"),
        ("h100:8", "`h100` is not a chip; known are `v5e`, `v5p`, `v6e`."),
        ("v5e", "`v5e` names no slices; write a chip, a colon and its numbers of chips, as in v5e:4..256"),
        ("v5e:4-16", "`v5e:4-16` names no slices"),
        ("v5e:4..", "`v5e:4..` names no slices"),
        ("", "`` names no slices"),
        ("v5e:4..12", "have a power of two of chips, but 12 is none; write 8 or 16"),
        ("v5e:0..8", "but 0 is none; write 1 or 2"),
        ("v5e:16..4", "16..4 runs downwards; write 4..16"),
        ("v5e:4..512", "There is no slice of 512 chips of v5e; there are 1, 4, 8, 16"),
        ("v6e:2", "There is no slice of 2 chips of v6e"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_told_in_a_sentence(text, told):
    with pytest.raises(UserError) as error:
        parse_sweep(text)
    assert told in str(error.value)


def test_ranges_hold_both_ends_and_nothing_twice():
    found = [(chip.name, chips) for chip, chips in parse_sweep("v5e:4..16, v5e:16,v5p:1..4")]
    assert found == [("v5e", 4), ("v5e", 8), ("v5e", 16), ("v5p", 1), ("v5p", 4)]


def test_pmap_is_not_swept():
    with pytest.raises(UserError, match="Only parallel: jit is swept"):
        sweep(work(parallel="pmap"), parse_sweep("v5p:4"))


@pytest.mark.parametrize("model", [pytest.param("flux-schnell", marks=pytest.mark.slow), "flux2-klein"])
def test_a_chunk_s_operations_are_two_per_weight_and_token_and_attention_s(model):
    size = {"height": 512, "width": 512, "text_tokens": 512, "steps_per_image": 4, "prompts_at_once": 2}
    asked = work_of(TrainConfig(**SIZES, **size, model=model, prompts="p", out="o", steps=10, model_dtype="bf16"))
    cost = chunk_cost(asked, abstract_setup(asked, dict.fromkeys(MESH_AXES, 1)))
    model, t5 = asked.model["transformer"], asked.model["t5"]
    img, txt, width = 1024, 512, 3072

    def weights(*trees):  # of matrices that tokens go through, not of those that make modulations
        leaves = {path: leaf for tree in trees for path, leaf in leaf_paths(tree).items()}
        return sum(leaf.size for path, leaf in leaves.items() if path.endswith("kernel") and "mod." not in path)

    blocks = model.config.depth_double + model.config.depth_single
    run = 2 * (weights(model.double.img) * img + weights(model.double.txt) * txt + weights(model.single) * (img + txt))
    run += 4 * blocks * (img + txt) ** 2 * width
    heads = t5.blocks.attn.q.kernel.shape[-1]
    text = 2 * weights(t5.blocks) * txt + 4 * t5.config.layers * txt**2 * heads
    assert cost.flops == pytest.approx(2 * (4 * run + text), rel=1e-3)
