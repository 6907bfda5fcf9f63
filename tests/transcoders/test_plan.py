"""Planning for devices: what a plan says is what the trainer's own arrays and program are, and what it refuses.

The logic is tested on the eight virtual devices; libtpu, where it is installed, compiles for TPUs that are not there.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from difffract_jax.cli import main as cli
from difffract_jax.cli.models import work_of
from difffract_jax.config import UserError
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders import plan as planning
from difffract_jax.transcoders.plan import (
    GIB,
    Topology,
    TrainingWorkload,
    communication,
    memory_asked,
    meshes,
    open_topology,
    plan,
)
from difffract_jax.transcoders.plan_phases import phases
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.setup import first_state, set_up
from difffract_jax.transcoders.sites import sites_of
from difffract_jax.transcoders.state import Moments

ROOT = Path(__file__).parents[2]
SITES, WIDTH = sites_of({"img": (0, 1), "txt": (0, 1)}), 16
SPREAD = {"data": 2, "site": 2, "feature": 2}
LIBTPU = "libtpu compiles for TPUs that are not here; pip install 'difffract_jax[tpu]'"


def work(**more):
    given = {"model": "m", "prompts": "p", "out": "o", "expansion": 4, "k": 4, "aux_k": 8, "time_embed": 4}
    given |= {"batch": 64, "buffer_rows": 256} | more
    return TrainingWorkload(TrainConfig(**given), SITES, WIDTH, {})


@pytest.fixture(scope="module")
def eight():
    return Topology("eight", jax.devices(), GIB)


@pytest.fixture(scope="module")
def spread(eight):
    """The plan of a training over all axes of a mesh."""
    return plan(work(), eight, SPREAD)


@pytest.fixture(scope="module")
def alone():
    """The plan of the same training on one device."""
    return plan(work(), Topology("one", jax.devices()[:1], GIB))


def test_a_plan_counts_the_bytes_that_the_trainer_puts_on_a_device(spread):
    found = spread
    setup = set_up(work().settings, SITES, WIDTH, make_mesh(SPREAD))
    flat, ones = jnp.zeros((4, WIDTH)), jnp.ones(4)
    state = first_state(setup, Moments(flat, flat, ones, ones))
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards[:1]]
    assert found.state == sum(shards)
    # 4 sites x 64 rows x (x, y and t) of float32, over 2 x 2 devices; the buffer's 256 rows over all 8, t by rows.
    assert found.rows == 4 * 64 * (2 * WIDTH + 1) * 4 // 4
    assert found.buffer == 4 * 256 * 2 * WIDTH * 4 // 8 + 2 * 256 * 4 // 2
    assert found.arguments == found.state + found.rows
    assert found.needed == found.peak + found.buffer and found.fits
    assert found.mesh == SPREAD and found.chips == 8


def test_the_state_is_donated_and_the_shards_talk(spread, alone):
    found = spread
    assert found.outputs < found.state / 10  # the metrics, no second state
    assert found.communication["all-reduce"]["operations"] > 0
    # Encoder and decoder forward, three products backward, and one to x, where FiLM learns: 2 operations per weight.
    assert found.flops == 2 * 6 * WIDTH * 4 * WIDTH * 64 * 4
    assert alone.communication == {} and alone.mesh == {"data": 1, "site": 1, "feature": 1}


def test_meshes_use_every_chip_divide_everything_and_least_memory_comes_first(eight):
    found = meshes(work(), eight)
    assert {8} == {shape["data"] * shape["site"] * shape["feature"] for shape in found}
    assert all(shape["site"] in (1, 2, 4) for shape in found)
    estimates = [planning.estimate(work(), shape) for shape in found]
    assert estimates == sorted(estimates)
    assert found[0]["site"] == 4  # splits state and work without communication
    with pytest.raises(UserError, match="No mesh spreads 63 rows, 4 sites and 65 features over the 8 chips of eight"):
        meshes(work(batch=63, buffer_rows=256, expansion=65 / 16), eight)


def test_a_refresh_is_planned_with_the_model_spread_and_without_encoders_between_refreshes(eight):
    settings = TrainConfig(model="tiny", prompts="p", out="o", sites=["img/*", "txt/*"], height=16, width=16)
    more = {"text_tokens": 8, "steps_per_image": 2, "prompts_at_once": 4, "expansion": 4, "k": 4, "batch": 64}
    asked = work_of(settings.model_copy(update={**more, "buffer_rows": 256}))
    beside, apart = (
        plan(asked._replace(settings=asked.settings.model_copy(update={"text_encoders": where})), eight, SPREAD)
        for where in ("device", "host")
    )
    assert list(apart.phases) == ["first state", "prompts", "rows"]
    assert apart.needed == max(apart.peak + apart.buffer + apart.model, *apart.phases.values())
    whole = planning.bytes_per_chip(asked.model["transformer"])
    assert whole / 8 <= apart.model < whole / 4, "all large matrices lie on all eight"
    assert apart.model < beside.model and apart.phases["rows"] < beside.phases["rows"]
    # What is encoded is the same; the encoders are counted once, whether they are there before or not.
    assert apart.phases["prompts"] + planning.bytes_per_chip(asked.model["vae"]) == beside.phases["prompts"]
    setup = set_up(asked.settings, asked.sites, asked.width, make_mesh(SPREAD))
    assert [phase.name for phase in phases(setup, asked.model, None)] == ["first state"]


def test_the_first_mesh_that_fits_is_taken_and_else_the_one_that_needs_least(eight):
    notes = []
    assert plan(work(), eight, note=notes.append).mesh == meshes(work(), eight)[0]
    assert len(notes) == 1 and "mesh data=" in notes[0]
    least = plan(work(), eight._replace(hbm=1000))
    assert not least.fits and least.needed > 1000


def test_the_smallest_that_fits_has_the_fewest_chips(alone):
    one, two = alone, alone._replace(chips=2)
    assert one.chips == 1
    assert planning.smallest_plan([two, one]) == one
    assert planning.smallest_plan([two, one._replace(fits=False)]) == two
    assert planning.smallest_plan([one._replace(fits=False)]) is None


@pytest.mark.parametrize(
    ("more", "mesh", "told"),
    [
        ({}, {"data": 4}, "The mesh data=4 has 4 devices, but eight has 8 chips"),
        ({"batch": 36}, {"data": 8}, "data=8, but batch, 36, is not divisible"),
        ({}, {"site": 8}, "site=8, but the number of sites, 4, is not divisible"),
        ({"expansion": 3.75}, {"feature": 8}, "feature=8, but the number of features, 60, is not divisible"),
        ({}, {"sight": 8}, "`sight` is not a mesh axis; did you mean `site`?"),
        ({"parallel": "pmap"}, {"data": 8}, "Only parallel: jit can be planned"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(eight, more, mesh, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        plan(work(**more), eight, mesh)


def test_what_the_compiler_says_when_memory_does_not_suffice_is_read():
    first = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (1.50G) exceeds available HBM (1G)."
    )
    assert memory_asked(first, GIB) == {"arguments": GIB, "temporaries": 3 * GIB // 2, "peak": 5 * GIB // 2}
    later = "Ran out of memory in memory space hbm. Used 2.00G of 1.00G hbm. Exceeded hbm capacity by 1.00G."
    assert memory_asked(later, GIB) == {"arguments": GIB, "temporaries": GIB, "peak": 2 * GIB}
    assert memory_asked("Ran out of memory.", GIB) == {}


def test_communication_is_counted_by_kind_with_the_bytes_of_the_results():
    program = """
      %all-reduce.1 = (f32[8]{0:T(128)}, bf16[2,4]{1,0}) all-reduce(%a, %b), channel_id=1
      %all-gather-start = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), channel_id=2
      %all-gather-done = f32[8]{0} all-gather-done(%all-gather-start)
      %all-reduce.2 = s32[] all-reduce(%d), channel_id=3
    """
    assert communication(program) == {
        "all-gather": {"operations": 1, "bytes": 32},
        "all-reduce": {"operations": 2, "bytes": 32 + 16 + 4},
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5q:2x2", "`v5q` is not a chip; did you mean `v5p`?"),
        ("h100:8", "`h100` is not a chip; known are `v5e`, `v5p`, `v6e`."),
        ("v5p", "write chip and shape, as in v5p:4x4x4"),
        ("v5e:8", "write chip and shape, as in v5e:8x8"),
    ],
)
def test_a_name_that_is_no_topology_is_one_sentence(name, told):
    with pytest.raises(UserError) as error:
        open_topology(name)
    assert told in str(error.value)


def test_without_libtpu_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, but no TPU: pip install 'difffract_jax\[tpu\]'\."):
        open_topology("v5e:2x2")


def test_libtpu_compiles_the_step_for_chips_that_are_not_here(monkeypatch, capsys):
    pytest.importorskip("libtpu", reason=LIBTPU)
    monkeypatch.chdir(ROOT)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["difffract", "plan", "configs/smoke.yaml", *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    status, out, err = run("--topology", "v5e:2x2", "--mesh", "site=2,feature=2", "--json")
    assert status == 0, err
    (found,) = json.loads(out)["plans"]
    assert found["fits"] and found["chips"] == 4 and json.loads(out)["smallest"] == "v5e:2x2"
    assert found["arguments"] >= found["state"] + found["rows"] and found["compiled_flops"] > 0
    assert found["communication"]["all-reduce"]["operations"] > 0
    assert "Compiling for v5e:2x2, mesh data=1,site=2,feature=2" in " ".join(err.split())
    status, out, err = run("--topology", "v5e:9x9")
    assert (status, out) == (1, "") and "libtpu knows no topology v5e:9x9" in err and "Traceback" not in err


def test_libtpu_says_what_does_not_fit_and_a_torus_takes_every_mesh():
    pytest.importorskip("libtpu", reason=LIBTPU)
    pod = open_topology("v5p:4x4x4")
    assert make_mesh({"data": 4, "site": 2, "feature": 8}, pod.devices).devices.shape == (4, 2, 8)
    large = TrainingWorkload(work(batch=2**21, buffer_rows=2**21, expansion=64).settings, SITES, WIDTH, {})
    refused = plan(large, open_topology("v5e:2x2"), {"feature": 4})
    assert not refused.fits and refused.temporaries > refused.hbm and refused.communication == {}
