"""Planning a trace: what a plan counts is what a trace holds, and libtpu compiles its programs for chips not here."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.plan import TraceWorkload, plan_trace
from difffract_jax.circuits.attribution.pullback import PullOptions
from difffract_jax.circuits.frozen.replacement import prepare_step
from difffract_jax.circuits.trace.capture import blocks_for, capture
from difffract_jax.cli import main as cli
from difffract_jax.config import UserError
from difffract_jax.models.tiny import random_pipeline
from difffract_jax.sharding import make_mesh
from difffract_jax.transcoders.plan import GIB, Topology, bytes_per_chip
from traces import make_transcoders

LIBTPU = "libtpu compiles for TPUs that are not here; pip install 'difffract_jax[tpu]'"
SETTINGS = """
model: organism
transcoders: organism
prompt: a red circle
target: img/1/f1
height: 32
width: 32
text_tokens: 16
expansion_batch: 6
plan: {sites: ["img/0"], expansion: 4, active: 16}
"""


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_plan_counts_what_a_trace_holds():
    pipe = random_pipeline()
    tcs = make_transcoders(pipe.config.transformer, img=(1, 2), txt=(), dtype=jnp.float32)
    trace = capture(pipe, tcs, "a red circle", step=1, run=pipe.plan(height=24, width=32, text_tokens=16))
    prepared = prepare_step(trace, tcs, active=(24, 24, 24))
    config, parts = pipe.config.transformer, {name: getattr(pipe, name) for name in ("transformer", "t5")}
    blocks = blocks_for(config, tcs, False)
    asked = TraceWorkload(
        config, parts, tcs, blocks, trace.info.grid, 16, active=24, targets=6, mesh={"data": 2}, precision="bf16"
    )
    one = Topology("v5p:one", jax.devices()[:1], GIB)
    plan = plan_trace(asked, one)
    held = nbytes((trace.record._replace(weights=None), prepared.sources.values, prepared.sources.errors))
    assert plan.record == held + nbytes([s.layers for s in prepared.sites])
    # Of the weights only two of three double-stream blocks are copies; the rest are the model's own arrays.
    assert plan.weights == nbytes(trace.record.weights.stacks[0])
    assert plan.model == nbytes(parts) and plan.transcoders == nbytes(tcs.stacks["img"])
    assert plan.targets == 3  # per device
    names = ["record a step", "encode img", "constant", "read targets", "pull back 3"]
    assert [program.name for program in plan.programs] == names
    assert plan.fits and all(held <= program.needed <= GIB for program in plan.programs)
    seq, width, layers, features = 12 + 16, config.d_model, 2, tcs.config.features
    recorded, encoded, _, _, pulled = (program.flops for program in plan.programs)
    assert recorded == 3 * (24 * seq * width**2 + 4 * seq**2 * width)
    assert encoded == layers * 6 * 12 * features * width
    each = layers * (4 * seq * width**2 + 2 * seq**2 * width + 2 * 12 * 24 * width)
    assert pulled == 3 * each + layers * 2 * seq**2 * width
    assert plan.seconds_per_node == pytest.approx(pulled / 459e12 / 3)  # one pass of bfloat16 products
    small = plan_trace(asked, one._replace(hbm=1000))
    assert not small.fits and small.programs[0].needed > 1000


def test_a_mesh_that_the_chips_do_not_make_is_refused():
    pipe = random_pipeline()
    tcs = make_transcoders(pipe.config.transformer, img=(2,), txt=(), dtype=jnp.float32)
    size = {"grid": (3, 4), "text_tokens": 16, "active": 24, "targets": 4, "mesh": {}, "precision": "f32"}
    blocks = blocks_for(pipe.config.transformer, tcs, False)
    asked = TraceWorkload(pipe.config.transformer, {"transformer": pipe.transformer}, tcs, blocks, **size)
    two = Topology("v5p:two", jax.devices()[:2], GIB)
    with pytest.raises(UserError, match="The mesh feature=4 has 4 devices, but v5p:two has 2 chips"):
        plan_trace(asked._replace(mesh={"feature": 4}), two)
    with pytest.raises(UserError, match="`heads` is not a mesh axis"):
        plan_trace(asked._replace(mesh={"heads": 4}), two)


@pytest.mark.slow
def test_a_plan_for_a_mesh_counts_what_each_of_its_devices_holds():
    pipe = random_pipeline()
    tcs = make_transcoders(pipe.config.transformer, img=(2,), txt=(), dtype=jnp.float32)
    run, shape = pipe.plan(height=24, width=32, text_tokens=16), {"feature": 2}
    mesh = make_mesh(shape)
    trace = capture(pipe, tcs, "a red circle", step=1, run=run)
    (step,) = make_engine(trace, tcs, (), PullOptions(mesh)).steps
    places = tuple(values.shape[2] for values in step.sources.values)
    blocks = blocks_for(pipe.config.transformer, tcs, False)
    size = {"grid": trace.info.grid, "text_tokens": 16, "active": max(places), "targets": 4, "mesh": shape}
    asked = TraceWorkload(
        pipe.config.transformer, {"transformer": pipe.transformer}, tcs, blocks, **size, precision="f32"
    )
    two = Topology("v5p:two", jax.devices()[:2], GIB)
    plan = plan_trace(asked, two)
    sources, sites = step.sources, step.sites
    held = (step.record._replace(weights=None), sources.values, sources.errors, [one.layers for one in sites])
    assert plan.mesh == shape and plan.targets == 4
    assert plan.record == bytes_per_chip(held) < nbytes(held)
    assert plan.transcoders == bytes_per_chip([one.stack for one in sites]) < 0.6 * nbytes(tcs.stacks)
    assert 0.5 * nbytes(pipe.transformer) < plan.model < 0.6 * nbytes(pipe.transformer)
    whole = plan_trace(asked._replace(mesh={}), two)
    assert plan.programs[-1].flops == whole.programs[-1].flops / 2
    assert all(part.needed < entire.needed for part, entire in zip(plan.programs, whole.programs, strict=True))


def test_libtpu_compiles_a_trace_for_chips_that_are_not_here(monkeypatch, capsys, tmp_path):
    pytest.importorskip("libtpu", reason=LIBTPU)
    (tmp_path / "trace.yaml").write_text(SETTINGS)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["difffract", "plan", "--trace", str(tmp_path / "trace.yaml"), *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    status, out, err = run("--topology", "v5e:2x2", "--mesh", "feature=4", "--json")
    assert status == 0, err
    (found,) = json.loads(out)["plans"]
    assert found["fits"] and found["programs"][-1]["name"] == "pull back 6" and found["mesh"] == {"feature": 4}
    assert all(program["peak"] >= program["arguments"] > 0 for program in found["programs"])
    assert "Compiling for v5e:2x2: constant" in err
    for more, told in (
        (("--mesh", "auto"), "`auto` chooses meshes for training alone"),
        (("--set", "step=0-2"), "One step is planned at a time"),
        (("--set", "height=null"), "A plan needs height and width"),
        (("--set", "plan.sites=[img/9]"), "The site img/9 does not exist"),
    ):
        status, out, err = run("--topology", "v5e:2x2", *more)
        assert (status, out) == (1, "") and told in err and "Traceback" not in err
